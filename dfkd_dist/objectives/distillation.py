"""Distillation from one or several teachers: DFMF Eqs. 1 and 2, and the same terms under other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses import distillation, vid
from dfkd_dist.losses.weighted import Losses, global_mean, weighted
from dfkd_dist.models.heads import VIDHead
from dfkd_dist.models.signals import LOGITS, MAP, Batch, Need, Signals
from dfkd_dist.objectives.base import Student

Shapes = Mapping[str, tuple[int, ...]]


def needed(spec: ObjectiveSpec) -> Need:
    """Signals that the terms with a weight want from the teachers and from the student."""
    return frozenset({LOGITS, MAP}) if spec.vid > 0 or spec.at > 0 else frozenset({LOGITS})


class Distillation(nn.Module):
    """Weighted sum of distillation terms, with their trainable heads.

    Args:
        spec: weights, temperature, target.
        teacher_weights: w_k, summing to 1; empty for a labelled source.
        student_shapes: shapes of the student's signals (without N).
        teacher_shapes: the same for each teacher.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        teacher_weights: Sequence[float],
        student_shapes: Shapes,
        teacher_shapes: Sequence[Shapes],
    ) -> None:
        super().__init__()
        self.spec, self.teacher_weights = spec, list(teacher_weights)
        pairs = [(student_shapes[MAP][0], shapes[MAP][0]) for shapes in teacher_shapes] if spec.vid > 0 else []
        self.vid_heads = nn.ModuleList(VIDHead(own, other, vid.initial_rho()) for own, other in pairs)

    @property
    def need(self) -> Need:
        """Signals wanted from the teachers and from the student."""
        return needed(self.spec)

    views = 1

    def forward(self, network: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named terms: each the local sum over the global count."""
        student = network(batch.images_NCHW, self.need)

        def mean(values_N: Tensor) -> Tensor:
            return global_mean(values_N, batch.count, batch.mask_N)

        return weighted(
            {
                "kl": lambda: mean(self._kl(student.logits_NC, answers)),
                "vid": lambda: mean(self._vid(student, answers)),
                "l1": lambda: mean(distillation.l1(self._mean_logits(answers), student.logits_NC)),
                "at": lambda: mean(self._attention(student, answers)),
                "ce": lambda: mean(distillation.cross_entropy(student.logits_NC, cast(Tensor, batch.labels_N))),
            },
            self.spec.weights(),
        )

    def _kl(self, logits_NC: Tensor, answers: Sequence[Signals]) -> Tensor:
        compare = distillation.kl if self.spec.kl_direction == "forward" else distillation.reverse_kl
        scale = self.spec.temperature**2 if self.spec.kl_scale == "tau2" else 1.0
        return scale * compare(self._target(answers), logits_NC, self.spec.temperature)

    def _target(self, answers: Sequence[Signals]) -> Tensor:
        """`[N, C]`, tempered: DFMF's mean of probabilities, or another way to make one target of several."""
        logits, tau = [a.logits_NC for a in answers], self.spec.temperature
        match self.spec.target:
            case "mean_probabilities":
                return distillation.tempered_mean(logits, self.teacher_weights, tau)
            case "mean_logits":
                return distillation.tempered_mean([self._mean_logits(answers)], [1.0], tau)
            case "lowest_entropy":
                probs = [distillation.tempered_mean([logits_NC], [1.0], tau) for logits_NC in logits]
                return distillation.lowest_entropy_choice(torch.stack(probs))

    def _mean_logits(self, answers: Sequence[Signals]) -> Tensor:
        return distillation.mean_logits([a.logits_NC for a in answers], self.teacher_weights)

    def _vid(self, student: Signals, answers: Sequence[Signals]) -> Tensor:
        total = student.logits_NC.new_zeros(len(student.logits_NC))
        for weight, head, answer in zip(self.teacher_weights, self.vid_heads, answers, strict=True):
            assert isinstance(head, VIDHead) and student.map_NDHW is not None and answer.map_NDHW is not None
            own, target = vid.match_spatial(student.map_NDHW, answer.map_NDHW)
            total = total + weight * vid.vid(head(own), target, vid.variance(head.rho))
        return total

    def _attention(self, student: Signals, answers: Sequence[Signals]) -> Tensor:
        total = student.logits_NC.new_zeros(len(student.logits_NC))
        for weight, answer in zip(self.teacher_weights, answers, strict=True):
            assert student.map_NDHW is not None and answer.map_NDHW is not None
            total = total + weight * distillation.attention_transfer(student.map_NDHW, answer.map_NDHW)
        return total
