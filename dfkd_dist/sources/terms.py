"""The terms that a generator or the images themselves minimise, by name: a method is a row of weights over these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfkd_dist.config import AdversarySpec, BNTermSpec, CompetitionSpec, DiscriminatorSpec
from dfkd_dist.losses import activation, adversarial, distillation, entropy, js, patch, priors, statistics
from dfkd_dist.losses.weighted import global_mean
from dfkd_dist.models.signals import BN, FEATURES, LOGITS, LayerStatistics, Need, Signals
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.statistics import Moments, combine_moments, share_of, sum_own

NEEDS: dict[str, Need] = {"bn": frozenset({BN}), "act": frozenset({FEATURES})}
"""Signals a term wants from the teacher beyond the logits."""

ADVERSARIAL: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": adversarial.kl,
    "masked_kl": adversarial.masked_kl,
    "l1": lambda teacher, other, _: adversarial.l1(teacher, other),
}
"""Forms that are per-sample; `log_l1` couples the batch."""


@dataclass(frozen=True)
class GeneratorStep:
    """What the terms are computed from.

    Args:
        teacher: the teacher's signals about this rank's images.
        other_NC: logits of the network that the adversary plays against, or None.
        count: images over the whole row.
        sync: the group whose images count as one batch.
        replicas: ranks of the row.
        scores: a discriminator's scores of the images' patches, or None.
        labels_N: what the images are to show, or None.
        pixels_NCHW: the images as the priors see them (normalised), or None.
    """

    teacher: Signals
    other_NC: Tensor | None
    count: int
    sync: Group
    replicas: int
    scores: Tensor | None = None
    labels_N: Tensor | None = None
    pixels_NCHW: Tensor | None = None

    def mean(self, values_N: Tensor) -> Tensor:
        """Local sum over the global count."""
        return global_mean(values_N, self.count)

    def shared(self, term: Tensor) -> Tensor:
        """This rank's share of a batch-coupled term."""
        return share_of(term, self.sync, self.replicas)


def need_of(weights: Mapping[str, float]) -> Need:
    """Signals that the terms with a positive weight want from the teacher."""
    wanted = [NEEDS.get(name, frozenset()) for name, weight in weights.items() if weight > 0]
    return frozenset({LOGITS}).union(*wanted)


def generator_terms(
    step: GeneratorStep,
    bn: BNTermSpec,
    adversary: AdversarySpec,
    discriminator: DiscriminatorSpec | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Name to a function that computes the term (`losses.weighted` calls those with a weight).

    Per-sample terms are local sums over the global count; `bn`, `bce` and DFAD's `log_l1` are batch-coupled and stand
    in as this rank's share of the global term, so the row's losses add up to DFMF Eqs. 3, 5 and 6.
    """

    def adv() -> Tensor:
        assert step.other_NC is not None
        if adversary.form == "log_l1":
            return step.shared(adversarial.log_l1(_mean_l1(step, step.other_NC)))
        return step.mean(ADVERSARIAL[adversary.form](step.teacher.logits_NC, step.other_NC, adversary.temperature))

    def act() -> Tensor:
        assert step.teacher.features_ND is not None
        return step.mean(activation.activation(step.teacher.features_ND))

    def fooled() -> Tensor:
        assert step.scores is not None and discriminator is not None
        return step.mean(patch.generator(step.scores, discriminator.form, discriminator.reduction))

    return {
        "bn": lambda: step.shared(_bn(step, bn)),
        "ice": lambda: step.mean(entropy.instance_entropy(step.teacher.logits_NC)),
        "oh": lambda: step.mean(entropy.one_hot(step.teacher.logits_NC)),
        "bce": lambda: step.shared(entropy.negative_batch_entropy(_mean_probabilities(step))),
        "act": act,
        "adv": adv,
        "patch": fooled,
    }


def image_terms(
    step: GeneratorStep, competition: CompetitionSpec, l2_over: Literal["image", "batch"]
) -> dict[str, Callable[[], Tensor]]:
    """DeepInversion's further terms: labels, priors and adaptive competition. As `generator_terms`.

    `tv`, the `clamped` competition and the norm of a batch are batch-coupled.
    """

    def pixels() -> Tensor:
        assert step.pixels_NCHW is not None
        return step.pixels_NCHW

    def ce() -> Tensor:
        assert step.labels_N is not None
        return step.mean(distillation.cross_entropy(step.teacher.logits_NC, step.labels_N))

    def compete() -> Tensor:
        assert step.other_NC is not None
        differ_N = js.divergence(step.teacher.logits_NC, step.other_NC, competition.temperature, competition.divergence)
        if competition.form == "negative":
            return step.mean(-differ_N)
        return step.shared(js.competition(sum_own(differ_N.sum(), step.sync) / _batch(step)))

    def norm() -> Tensor:
        if l2_over == "image":
            return step.mean(priors.l2(pixels()))
        squares = sum_own(priors.l2_squares(pixels()).sum(), step.sync)
        return step.shared(priors.norm_of_squares(squares))

    return {
        "ce": ce,
        "tv": lambda: step.shared(priors.tv(sum_own(priors.tv_squares(pixels()), step.sync))),
        "tv_l1": lambda: step.mean(priors.tv_l1(pixels())),
        "l2": norm,
        "js": compete,
    }


def _bn(step: GeneratorStep, bn: BNTermSpec) -> Tensor:
    return bn_term(global_layers(step), bn)


def bn_term(layers: Sequence[LayerStatistics], bn: BNTermSpec) -> Tensor:
    """The term `bn` from the statistics of a global batch, whole (not this rank's share)."""
    factors = statistics.first_layer_factors(len(layers), bn.first_layer)
    return statistics.bn_loss(layers, form=bn.form, channels=bn.channels, factors=factors)


def global_layers(step: GeneratorStep) -> list[LayerStatistics]:
    """Statistics of the teacher's layers over the images of `sync`; gradient flows to this rank's own part."""
    layers, images = step.teacher.bn, len(step.teacher.logits_NC)
    moments = combine_moments([Moments(layer.mean_C, layer.var_C) for layer in layers], images, step.sync)
    return [
        LayerStatistics(m.mean_C, m.var_C, layer.stored_mean_C, layer.stored_var_C)
        for m, layer in zip(moments, layers, strict=True)
    ]


def _mean_probabilities(step: GeneratorStep) -> Tensor:
    """`[C]`: the mean over the images of `sync`, and over their pixels where these have classes of their own."""
    return sum_own(entropy.summed_probs(step.teacher.logits_NC), step.sync) / _batch(step)


def _mean_l1(step: GeneratorStep, other_NC: Tensor) -> Tensor:
    """DFAD's discrepancy: the mean over the images of `sync`, a scalar."""
    return sum_own(distillation.l1(step.teacher.logits_NC, other_NC).sum(), step.sync) / _batch(step)


def _batch(step: GeneratorStep) -> int:
    """Images of `sync`: the row's, or a rank's own where it stands alone."""
    return step.count if step.sync.size == step.replicas else max(len(step.teacher.logits_NC), 1)
