"""The terms a generator minimises, by name: a row of DFMF's Table 1 (or MosaicKD) is a row of weights over these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dfkd_dist.config import AdversarySpec, BNTermSpec, DiscriminatorSpec
from dfkd_dist.losses import activation, adversarial, distillation, entropy, patch, statistics
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
    """

    teacher: Signals
    other_NC: Tensor | None
    count: int
    sync: Group
    replicas: int
    scores: Tensor | None = None

    def mean(self, values_N: Tensor) -> Tensor:
        """Local sum over the global count."""
        return global_mean(values_N, self.count)


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

    def shared(term: Tensor) -> Tensor:
        return share_of(term, step.sync, step.replicas)

    def adv() -> Tensor:
        assert step.other_NC is not None
        if adversary.form == "log_l1":
            return shared(adversarial.log_l1(_mean_l1(step, step.other_NC)))
        return step.mean(ADVERSARIAL[adversary.form](step.teacher.logits_NC, step.other_NC, adversary.temperature))

    def act() -> Tensor:
        assert step.teacher.features_ND is not None
        return step.mean(activation.activation(step.teacher.features_ND))

    def fooled() -> Tensor:
        assert step.scores is not None and discriminator is not None
        return step.mean(patch.generator(step.scores, discriminator.form, discriminator.reduction))

    return {
        "bn": lambda: shared(statistics.bn_loss(_global_layers(step), form=bn.form, channels=bn.channels)),
        "ice": lambda: step.mean(entropy.instance_entropy(step.teacher.logits_NC)),
        "oh": lambda: step.mean(entropy.one_hot(step.teacher.logits_NC)),
        "bce": lambda: shared(entropy.negative_batch_entropy(_mean_probabilities(step))),
        "act": act,
        "adv": adv,
        "patch": fooled,
    }


def _global_layers(step: GeneratorStep) -> list[LayerStatistics]:
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
