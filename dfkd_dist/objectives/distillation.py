"""Distillation from one or several teachers: a weighted sum of terms, each with its own trainable heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.objectives.base import Student
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.memory import Contrast
from dfkd_dist.objectives.pointwise import KL, L1, VID, Attention, CrossEntropy, Hint
from dfkd_dist.objectives.relations import Angles, Distances
from dfkd_dist.objectives.term import Step, Term

TERMS: dict[str, type[Term]] = {
    "kl": KL,
    "vid": VID,
    "l1": L1,
    "at": Attention,
    "ce": CrossEntropy,
    "hint": Hint,
    "rkd_d": Distances,
    "rkd_a": Angles,
    "crd": Contrast,
}
"""Name of a weight in the recipe to its term."""


def needs(spec: ObjectiveSpec) -> Needs:
    """Signals that the terms with a weight want."""
    found = Needs.both()
    for name in _used(spec):
        found = found | TERMS[name].needs(spec)
    return found


class Distillation(nn.Module):
    """Weighted sum of the terms that have a weight, with their trainable heads.

    Args:
        spec: weights, temperature, target and the options of terms.
        context: shapes of signals, the teachers' weights, groups.
    """

    views = 1

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__()
        self.spec, self._needs = spec, needs(spec)
        self.need = self._needs.teacher
        self.terms = nn.ModuleDict({name: TERMS[name](spec, context) for name in _used(spec)})

    def forward(self, student: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named terms on this rank's images: local sums over the global count, or shares of coupled terms."""
        step = Step(student(batch.images_NCHW, self._needs.student), answers, batch)
        return weighted({name: partial(term, step) for name, term in self.terms.items()}, self._weights())

    def _weights(self) -> dict[str, float]:
        weights = self.spec.weights()
        return {name: weights[name] for name in self.terms}


def _used(spec: ObjectiveSpec) -> list[str]:
    return [name for name, weight in spec.weights().items() if weight > 0]
