"""KD3: feature alignment in front of the teacher's classifier, and contrast between clean and perturbed images.

"Distribution Shift Matters for Knowledge Distillation with Webly Collected Images" (Tang et al. 2023), Eqs. 9 to 18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dfkd_dist.config.kd3 import KD3Spec
from dfkd_dist.losses import distillation, kd3
from dfkd_dist.losses.weighted import Losses, global_mean, weighted
from dfkd_dist.models.signals import FEATURES, LOGITS, Batch, Need, Signals
from dfkd_dist.objectives.base import Student
from dfkd_dist.objectives.context import Context
from dfkd_dist.objectives.term import of_all_ranks
from dfkd_dist.parallel.statistics import share_of

STUDENT, TEACHER, CROSS = "mdcl_student", "mdcl_teacher", "mdcl_cross"


def needed(spec: KD3Spec) -> Need:
    """Signals wanted from the teacher and from the student."""
    return frozenset({LOGITS, FEATURES}) if spec.align > 0 or spec.mdcl > 0 else frozenset({LOGITS})


class KD3(nn.Module):
    """The terms of Eq. 18, with the trainable heads W_p of both networks (Eqs. 13 and 14).

    Args:
        spec: weights and readings.
        context: shapes of both networks' features, and the ranks that share a batch.

    Raises:
        ValueError: not one teacher, a network without a linear classifier, or features of unequal widths where they
            must agree.
    """

    def __init__(self, spec: KD3Spec, context: Context) -> None:
        super().__init__()
        if len(context.teacher_shapes) != 1:
            raise ValueError(f"objective.kind: kd3 needs exactly 1 teacher, found {len(context.teacher_shapes)}")
        self.spec, self.world = spec, context.world
        self.views, self.need = spec.views, needed(spec)
        self.student_head: nn.Linear | None = None
        self.teacher_head: nn.Linear | None = None
        if FEATURES not in self.need:
            return
        own, other = _width("student", context.student_shapes), _width("teacher", context.teacher_shapes[0])
        if spec.equal_features and own != other:
            raise ValueError(
                f"objective: the student's features have width {own}, the teacher's {other}; align, classifier: shared "
                "and shared_head need equal widths"
            )
        if spec.mdcl > 0:
            self.student_head = nn.Linear(own, spec.head)
            self.teacher_head = self.student_head if spec.shared_head else nn.Linear(other, spec.head)

    def forward(self, student: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named terms: each this rank's part of the global one."""
        if batch.views != self.views:
            raise ValueError(f"the batch holds {batch.views} version(s) of each image, kd3 needs {self.views}")
        heard = answers[0].views(self.views)
        # Clean images first: batch norm sees the two versions apart, in this order.
        said = [student(images_NCHW, self.need) for images_NCHW in batch.images_NCHW.tensor_split(self.views)]
        clean, target = said[0], heard[0]

        def mean(values_N: Tensor) -> Tensor:
            return global_mean(values_N, batch.count, batch.mask_N)

        weights_N = kd3.instance_weights(target.logits_NC, clean.logits_NC)
        sums = self._contrasts(said, heard, batch)
        scale = 1.0 / batch.count if self.spec.reduction == "mean" else 1.0
        return weighted(
            {
                "wfa": lambda: mean(self._alignment(weights_N, clean, target)),
                **{name: lambda name=name: scale * sums[name] for name in (STUDENT, TEACHER, CROSS)},  # type: ignore[misc]
                "hard": lambda: mean(distillation.cross_entropy(clean.logits_NC, target.logits_NC.argmax(dim=1))),
                "soft": lambda: mean(self._soft(clean.logits_NC, target.logits_NC)),
            },
            self.spec.weights(),
            {"instance_weight": mean(weights_N)} | self._both_reductions(sums, batch.count),
        )

    def _alignment(self, weights_N: Tensor, clean: Signals, target: Signals) -> Tensor:
        return kd3.weighted_alignment(weights_N, clean.tensor(FEATURES), target.tensor(FEATURES))

    def _soft(self, logits_NC: Tensor, target_NC: Tensor) -> Tensor:
        tau = self.spec.classifier_temperature
        return distillation.kl(distillation.tempered_mean([target_NC], [1.0], tau), logits_NC, tau)

    # ------------------------------------------------------------------------------------------- contrast

    def _contrasts(self, said: Sequence[Signals], heard: Sequence[Signals], batch: Batch) -> dict[str, Tensor]:
        """This rank's share of each contrast, summed over the global batch (Eqs. 15 and 16)."""
        if self.student_head is None or self.teacher_head is None:
            return {}
        pairs = [(self.student_head, said), (self.teacher_head, heard)]
        own = [self._embedded(head, signals) for head, both in pairs for signals in (both[0], both[-1])]
        parts, valid_M = of_all_ranks(own, batch, self.world)
        student, student_hat, teacher, teacher_hat = parts
        wanted = {STUDENT: (student, student_hat), TEACHER: (teacher, teacher_hat)}
        if self.spec.cross > 0:
            wanted[CROSS] = (student, teacher_hat)
        return {name: self._share(kd3.similarity(a_ME, b_ME), valid_M) for name, (a_ME, b_ME) in wanted.items()}

    def _embedded(self, head: nn.Linear, signals: Signals) -> Tensor:
        return kd3.embedding(head(signals.tensor(FEATURES).to(head.weight.dtype)))

    def _share(self, similarity_MM: Tensor, valid_M: Tensor) -> Tensor:
        values_M = kd3.contrast(similarity_MM, self.spec.temperature, self.spec.denominator, valid_M)
        # Every rank computes the whole sum; its gradient here is that by this rank's own embeddings.
        return share_of(values_M.sum(), self.world, self.world.size)

    def _both_reductions(self, sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """L_mdcl of Eq. 17 as printed (a sum) and per image."""
        if not sums:
            return {}
        total = sums[STUDENT] + sums[TEACHER]
        return {"mdcl_sum": total, "mdcl_mean": total / count}


def _width(whose: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get(FEATURES, ())
    if len(shape) != 1:
        raise ValueError(f"objective.kind: kd3 needs the {whose}'s features `[N, D]` before a linear classifier")
    return int(shape[0])
