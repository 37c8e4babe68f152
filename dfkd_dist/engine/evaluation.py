"""What an evaluation on labelled images comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

AVG_PRED, HIGHEST_CONF, STUDENT = "AvgPred", "HighestConf", "student"
"""Mean of the teachers' probabilities (DFMF Eq. 1), answer of the teacher with the lowest entropy, the student."""
COMPENSATED = "student (compensated)"
"""The student with what its compensation adds in training (KDCI); the student itself is what is exported."""


@dataclass(frozen=True)
class Overlap:
    """How well predicted regions cover the true ones, in percent (segmentation).

    Args:
        miou: mean intersection over union of the classes that occur, in the labels or in the predictions.
        iou: of each class by name; None of one that occurs in neither.
    """

    miou: float
    iou: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, of images or (where these have the labels) of pixels.

    Args:
        split: which images.
        samples: how many; each was seen once.
        student: the student's accuracy.
        teachers: by name, in recipe order; empty where only the student was asked.
        ensembles: by name.
        frequent: for each `teacher/NAME`, ensemble and `student`, accuracy on each party's frequent classes (None: no
            such image); empty where pixels have the labels.
        compensated: the compensated student's accuracy, where there is a compensation.
        overlaps: for the same voters, where pixels have the labels; else empty.
    """

    split: str
    samples: int
    student: float
    teachers: dict[str, float] = field(default_factory=dict)
    ensembles: dict[str, float] = field(default_factory=dict)
    frequent: dict[str, list[float | None]] = field(default_factory=dict)
    compensated: float | None = None
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, float]]:
        """(name, percent) of what was measured: `test/student`, `test/student/party0`, `test/student/miou` ..."""
        voters = {f"teacher/{name}": value for name, value in self.teachers.items()}
        own = {STUDENT: self.student} | ({} if self.compensated is None else {COMPENSATED: self.compensated})
        for voter, value in (voters | self.ensembles | own).items():
            yield f"{self.split}/{voter}", value
            if voter in self.overlaps:
                yield f"{self.split}/{voter}/miou", self.overlaps[voter].miou
            for party, part in enumerate(self.frequent.get(voter, [])):
                if part is not None:
                    yield f"{self.split}/{voter}/party{party}", part

    def teacher_scores(self) -> dict[str, float]:
        """What teachers are ranked by: their mIoU where pixels have the labels, else their accuracy."""
        if not self.overlaps:
            return self.teachers
        return {name: self.overlaps[f"teacher/{name}"].miou for name in self.teachers}


@dataclass(frozen=True)
class BestTeacher:
    """The teacher chosen on validation images, with its accuracy on others (percent; in segmentation its mIoU)."""

    name: str
    validation: float
    accuracy: float


def best_teacher(val: Evaluation, test: Evaluation) -> BestTeacher:
    """The best single teacher, chosen on `val` (ties: the first in the recipe), reported on `test`.

    Raises:
        ValueError: an evaluation without teachers.
    """
    if not val.teachers or not test.teachers:
        raise ValueError("best_teacher: expected evaluations of teachers, found one of a student alone")
    chosen = val.teacher_scores()
    name = max(chosen, key=lambda teacher: chosen[teacher])
    return BestTeacher(name, chosen[name], test.teacher_scores()[name])
