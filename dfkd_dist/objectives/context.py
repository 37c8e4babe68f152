"""What an objective is built from besides its section of a recipe, and what it wants to hear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dfkd_dist.models.signals import LOGITS, Need
from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.randomness import Randomness

Shapes = Mapping[str, tuple[int, ...]]
"""Signal name to its shape without N."""


@dataclass(frozen=True)
class Context:
    """What an objective is built from besides its section.

    Args:
        teacher_weights: w_k, summing to 1; empty for a labelled source without teachers.
        student_shapes: shapes of the student's signals (without N).
        teacher_shapes: the same for each teacher.
        num_classes: C.
        samples: size of the stream's set, for objectives that remember every sample; None for other sources.
        world: the ranks whose images count as one batch for terms that couple them.
        randomness: counter-based.
        replicas: the ranks that hold this objective and share each batch, where they are more than `world` (a run with
            `mesh.sync: local`); None means `world`.
    """

    teacher_weights: Sequence[float]
    student_shapes: Shapes
    teacher_shapes: Sequence[Shapes]
    num_classes: int
    samples: int | None = None
    world: Group = ALONE
    randomness: Randomness = field(default_factory=lambda: Randomness(0))
    replicas: Group | None = None

    @property
    def ranks(self) -> Group:
        """The ranks that hold this objective and share each batch."""
        return self.world if self.replicas is None else self.replicas

    def widths(self, name: str, term: str) -> tuple[int, list[int]]:
        """First dimension of a signal of the student, and of every teacher.

        Raises:
            ValueError: a network has no such signal; names the term.
        """
        return self.shape(name, term)[0], [self.shape(name, term, k)[0] for k in range(len(self.teacher_shapes))]

    def shape(self, name: str, term: str, teacher: int | None = None) -> tuple[int, ...]:
        """Shape of a signal of the student, or of a teacher.

        Raises:
            ValueError: the network has no such signal; names the term.
        """
        shapes = self.student_shapes if teacher is None else self.teacher_shapes[teacher]
        if name not in shapes:
            whose = "the student" if teacher is None else f"teacher number {teacher}"
            raise ValueError(f"objective.{term} compares the signal {name!r}, which {whose} does not have")
        return shapes[name]


@dataclass(frozen=True)
class Needs:
    """Signals wanted from every teacher, and from the student."""

    teacher: Need
    student: Need

    @classmethod
    def both(cls, *names: str) -> Needs:
        """The logits and the signals named, of all networks."""
        need = frozenset({LOGITS, *names})
        return cls(need, need)

    def __or__(self, other: Needs) -> Needs:
        """What either wants."""
        return Needs(self.teacher | other.teacher, self.student | other.student)
