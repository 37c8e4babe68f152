"""Accuracy of every teacher, of their ensembles and of the student, on all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from dfkd_dist.config import DatasetSpec, SplitSpec
from dfkd_dist.data.datasets import DatasetError, ImageSet, Split, load_image_set, to_image_space
from dfkd_dist.data.splits import frequent_classes
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.teachers import reference_classes, teacher_weights
from dfkd_dist.losses.distillation import lowest_entropy_choice, tempered_mean
from dfkd_dist.models.signals import LOGITS, Batch
from dfkd_dist.models.teacher import class_order
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.topology import bounds

log = logging.getLogger(__name__)

AVG_PRED, HIGHEST_CONF, STUDENT = "AvgPred", "HighestConf", "student"
"""Mean of the teachers' probabilities (DFMF Eq. 1), answer of the teacher with the lowest entropy, the student."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent; `frequent` holds one for each party's frequent classes (None: no such image).

    Args:
        split: which images.
        samples: how many; each was seen once.
        student: the student's accuracy.
        teachers: by name, in recipe order; empty where only the student was asked.
        ensembles: by name.
        frequent: for each `teacher/NAME`, ensemble and `student`, accuracy on each party's frequent classes.
    """

    split: str
    samples: int
    student: float
    teachers: dict[str, float] = field(default_factory=dict)
    ensembles: dict[str, float] = field(default_factory=dict)
    frequent: dict[str, list[float | None]] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, float]]:
        """(name, percent) of everything measured, such as `test/student` and `test/student/party0`."""
        voters = {f"teacher/{name}": value for name, value in self.teachers.items()}
        for voter, value in (voters | self.ensembles | {STUDENT: self.student}).items():
            yield f"{self.split}/{voter}", value
            for party, part in enumerate(self.frequent.get(voter, [])):
                if part is not None:
                    yield f"{self.split}/{voter}/party{party}", part


@dataclass(frozen=True)
class BestTeacher:
    """The teacher chosen on validation images, with its accuracy on others (percent)."""

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
    name = max(val.teachers, key=lambda teacher: val.teachers[teacher])
    return BestTeacher(name, val.teachers[name], test.teachers[name])


class Panel:
    """All teachers and the student, asked about the images of one column of the mesh.

    A rank's teachers answer for the whole column; position j is dealt to row j mod T, whose rank gets every teacher's
    answer and asks its student. So each image passes once through each network, and ranks' counts simply add up.

    Args:
        build: the run.
        student_only: no teacher is asked.
    """

    def __init__(self, build: Build, student_only: bool = False) -> None:
        self.student, self.column = build.side.network, build.mesh.column
        self.asks_teachers = bool(build.cards) and not student_only
        self.dtype = next(self.student.parameters()).dtype
        self.device = build.device
        self._exchange = Exchange(build.mesh, build.teachers, build.trainer.exchange.shapes, frozenset({LOGITS}))

    def own(self, count: int) -> slice:
        """Which of `count` images of the column are dealt to this rank."""
        return slice(self.column.rank, count, self.column.size)

    def ask(self, column_NCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits about this rank's share: `[n, C]` of each teacher (recipe order), and the student's.

        Every rank of the column calls it with the same images. The student is read in eval mode as it will be
        exported (no autocast), and neither its mode nor its buffers change.

        Args:
            column_NCHW: `[N, C, H, W]` in image space; N may be 0, or no multiple of the rows.
        """
        count, rows = len(column_NCHW), self.column.size
        # Whole rows: no network ever gets an empty batch.
        missing = -count % rows if count else rows
        padded_NCHW = torch.cat([column_NCHW, column_NCHW.new_zeros(missing, *column_NCHW.shape[1:])])
        share_NCHW = padded_NCHW[self.own(len(padded_NCHW))]
        mine = len(range(self.column.rank, count, rows))
        with torch.no_grad(), reading_only(self.student, "eval"):
            student_NC = self.student(share_NCHW).logits_NC[:mine]
        if not self.asks_teachers:
            return [], student_NC
        answers = self._exchange.answers(Batch(share_NCHW, count, padded_NCHW))
        return [answer.logits_NC[:mine] for answer in answers], student_NC


def evaluate(
    build: Build,
    dataset: DatasetSpec | ImageSet,
    split: Split,
    *,
    batch: int,
    parties: SplitSpec | None,
    student_only: bool = False,
) -> Evaluation:
    """Every image once; the same result on every rank and at every world size. All ranks call it alike.

    Args:
        build: the run; without teachers the student alone is evaluated.
        dataset: where the images come from, or the images themselves.
        split: `val` or `test`.
        batch: images at a time over all ranks.
        parties: also report accuracy on each party's frequent classes.
        student_only: leave the teachers and their ensembles out.

    Raises:
        DatasetError: the images cannot be read.
        ValueError: the set's classes are not those of the run.
    """
    images = kept_set(dataset, split) if isinstance(dataset, DatasetSpec) else dataset
    labels_N = run_labels(images, build)
    panel, weights = Panel(build, student_only), teacher_weights(build.recipe)
    classes, mesh = build.recipe.num_classes, build.mesh
    names = [f"teacher/{spec.name}" for spec in build.recipe.teachers] + [AVG_PRED, HIGHEST_CONF, STUDENT]
    names = names if panel.asks_teachers else [STUDENT]
    # One row per voter, and one for the number of images, by class.
    counts_VC = torch.zeros(len(names) + 1, classes, dtype=torch.int64, device=build.device)
    for start in range(0, len(images), batch):
        pixels, all_labels_n = column_images(images, labels_N, start, batch, build)
        column_NCHW = to_image_space(pixels.to(build.device), panel.dtype)
        teachers, student_NC = panel.ask(column_NCHW)
        labels_n = all_labels_n[panel.own(len(all_labels_n))].to(build.device)
        for row, choice_n in enumerate([*votes(teachers, weights), student_NC.argmax(dim=1)]):
            counts_VC[row] += torch.bincount(labels_n[choice_n == labels_n], minlength=classes)
        counts_VC[-1] += torch.bincount(labels_n, minlength=classes)
    mesh.world.sum_(counts_VC)
    return _evaluation(split, names, counts_VC.cpu(), parties)


def column_images(images: ImageSet, labels_N: Tensor, start: int, batch: int, build: Build) -> tuple[Tensor, Tensor]:
    """This column's slice of the global batch at `start`: uint8 images `[n, C, H, W]` and labels `[n]`."""
    mesh, stop = build.mesh, min(start + batch, len(images))
    low, high = bounds(stop - start, mesh.topology.columns, mesh.topology.column_of(mesh.rank))
    positions = torch.arange(start + low, start + high)
    if len(positions) == 0:
        return torch.zeros(0, images.channels, images.size, images.size, dtype=torch.uint8), labels_N[:0]
    return images.images(positions), labels_N[positions]


def votes(teachers: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Predicted classes `[N]` of each teacher, then of AvgPred and of HighestConf; empty without teachers.

    Args:
        teachers: logits `[N, C]` each.
        weights: w_k, summing to 1.
    """
    if not teachers:
        return []
    single = [logits_NC.argmax(dim=1) for logits_NC in teachers]
    probs_KNC = torch.stack([tempered_mean([logits_NC], [1.0], 1.0) for logits_NC in teachers])
    average_NC = tempered_mean(teachers, weights, 1.0)
    return [*single, average_NC.argmax(dim=1), lowest_entropy_choice(probs_KNC).argmax(dim=1)]


def run_labels(images: ImageSet, build: Build) -> Tensor:
    """The set's labels `[N]` in the run's class order.

    Raises:
        ValueError: another number of classes, or other class names than the run's.
    """
    classes = build.recipe.num_classes
    if len(images.classes) != classes:
        raise ValueError(f"evaluation.dataset has {len(images.classes)} classes, but num_classes is {classes}")
    reference = reference_classes(build.cards) or build.student_card.classes
    try:
        order = class_order(images.classes, reference, "of evaluation.dataset")
    except ValueError as error:
        raise ValueError(f"evaluation.dataset: its class names are not the run's ({error})") from error
    return images.labels_N if order is None else torch.tensor(order).argsort()[images.labels_N]


def check_set(build: Build) -> None:
    """Read the recipe's evaluation images and compare them with the run: what would fail at the end fails now.

    Raises:
        DatasetError, ValueError: as `evaluate`, or the parties do not fit the classes.
    """
    spec = build.recipe.evaluation
    if spec is None:
        return
    try:
        images = kept_set(spec.dataset, "test")
    except DatasetError as error:
        raise DatasetError(f"evaluation.dataset: {error}") from error
    run_labels(images, build)
    if spec.split is not None:
        frequent_classes(build.recipe.num_classes, spec.split.parties)


def has_validation(build: Build) -> bool:
    """Whether every rank can read validation images, which choose the best teacher; why not is logged.

    A set may well consist of test images alone, so this is no error. All ranks call it alike.
    """
    spec, why = build.recipe.evaluation, ""
    if spec is None or spec.dataset.val_fraction == 0:
        return False
    try:
        kept_set(spec.dataset, "val")
    except DatasetError as error:
        why = str(error)
    found = [part for part in build.mesh.world.gather_objects(why) if part]
    if found and build.mesh.rank == 0:
        log.info("the best teacher is not reported: %s", found[0])
    return not found


def some_images(build: Build, count: int = 64) -> dict[str, Tensor]:
    """Real test images `[count, C, H, W]` by teacher, to look at beside generated ones; empty without a set."""
    spec = build.recipe.evaluation
    if spec is None:
        return {}
    images = kept_set(spec.dataset, "test")
    real_NCHW = to_image_space(images.images(torch.arange(min(count, len(images)))))
    return {teacher.name: real_NCHW for teacher in build.teachers}


def kept_set(spec: DatasetSpec, split: Split) -> ImageSet:
    """The images of a spec, kept between the evaluations of one run."""
    return _loaded(spec.model_dump_json(), split)


@lru_cache(maxsize=2)
def _loaded(spec: str, split: Split) -> ImageSet:
    """A spec is not hashable, its JSON is."""
    return load_image_set(DatasetSpec.model_validate_json(spec), split)


def _evaluation(split: str, names: Sequence[str], counts_VC: Tensor, parties: SplitSpec | None) -> Evaluation:
    overall = {name: percent(row, counts_VC[-1]) for name, row in zip(names, counts_VC, strict=False)}
    frequent: dict[str, list[float | None]] = {}
    if parties is not None:
        blocks = frequent_classes(counts_VC.shape[1], parties.parties)
        for name, row in zip(names, counts_VC, strict=False):
            frequent[name] = [percent(row[block], counts_VC[-1][block]) for block in blocks]
    known = {name: value for name, value in overall.items() if value is not None}
    teachers = {name.removeprefix("teacher/"): v for name, v in known.items() if name.startswith("teacher/")}
    ensembles = {name: known[name] for name in (AVG_PRED, HIGHEST_CONF) if name in known}
    return Evaluation(split, int(counts_VC[-1].sum()), known[STUDENT], teachers, ensembles, frequent)


def percent(part: Tensor, whole: Tensor) -> float | None:
    """100 times the ratio of the sums; None of nothing."""
    total = int(whole.sum())
    return 100.0 * float(part.sum()) / total if total else None
