"""From an objective's section of a recipe to the object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.models.signals import Need
from dfkd_dist.objectives import distillation
from dfkd_dist.objectives.base import Objective
from dfkd_dist.objectives.distillation import Distillation
from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.randomness import Randomness

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Context:
    """What an objective is built from besides its section.

    Args:
        teacher_weights: w_k, summing to 1; empty for a labelled source without teachers.
        student_shapes: shapes of the student's signals (without N).
        teacher_shapes: the same for each teacher.
        num_classes: C.
        samples: size of the stream's set, for objectives that remember every sample; None for other sources.
        world: the ranks that share a batch.
        randomness: counter-based.
    """

    teacher_weights: Sequence[float]
    student_shapes: Shapes
    teacher_shapes: Sequence[Shapes]
    num_classes: int
    samples: int | None = None
    world: Group = ALONE
    randomness: Randomness = field(default_factory=lambda: Randomness(0))


def needed(spec: ObjectiveSpec) -> Need:
    """Signals that an objective wants from the teachers and from the student."""
    return distillation.needed(spec)


def make_objective(spec: ObjectiveSpec, context: Context) -> Objective:
    """The objective of a section."""
    return Distillation(spec, context.teacher_weights, context.student_shapes, context.teacher_shapes)
