"""Accuracy of every teacher, of their ensembles and of the student, on all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dfkd_dist.config import DatasetSpec, SplitSpec
from dfkd_dist.data.datasets import DatasetError, ImageSet, Split, load_image_set, to_image_space
from dfkd_dist.data.mask_set import IGNORE
from dfkd_dist.data.splits import frequent_classes
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.evaluation import (
    AVG_PRED,
    COMPENSATED,
    HIGHEST_CONF,
    STUDENT,
    BestTeacher,
    Evaluation,
    Overlap,
    best_teacher,
)
from dfkd_dist.engine.tally import Tally, make_tally
from dfkd_dist.engine.teachers import reference_classes, teacher_weights
from dfkd_dist.losses.distillation import lowest_entropy_choice, tempered_mean
from dfkd_dist.models.signals import LOGITS, Batch
from dfkd_dist.models.teacher import class_order
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.topology import bounds

__all__ = [
    "AVG_PRED",
    "COMPENSATED",
    "HIGHEST_CONF",
    "STUDENT",
    "BestTeacher",
    "Evaluation",
    "Overlap",
    "Panel",
    "best_teacher",
    "check_set",
    "column_images",
    "evaluate",
    "has_validation",
    "kept_set",
    "run_classes",
    "some_images",
    "votes",
]

log = logging.getLogger(__name__)


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
        parties: also report accuracy on each party's frequent classes (where images have the labels).
        student_only: leave the teachers and their ensembles out.

    Raises:
        DatasetError: the images cannot be read.
        ValueError: the set's classes are not those of the run.
    """
    images = kept_set(dataset, split) if isinstance(dataset, DatasetSpec) else dataset
    order = label_order(images, build)
    panel, weights, compensation = Panel(build, student_only), teacher_weights(build.recipe), build.side.compensation
    tally = _tally(images, build, panel.asks_teachers, parties)
    for start in range(0, len(images), batch):
        pixels, positions = column_images(images, start, batch, build)
        teachers, student_NC = panel.ask(to_image_space(pixels.to(build.device), panel.dtype))
        labels_n = images.labels(positions)[panel.own(len(positions))]
        choices = [*votes(teachers, weights), student_NC.argmax(dim=1)]
        if compensation is not None:
            with torch.no_grad():
                choices.append(compensation(student_NC).argmax(dim=1))
        tally.add(choices, (labels_n if order is None else order[labels_n]).to(build.device))
    tally.sum_(build.mesh.world)
    return tally.evaluation(split)


def _tally(images: ImageSet, build: Build, asks_teachers: bool, parties: SplitSpec | None) -> Tally:
    names = [f"teacher/{spec.name}" for spec in build.recipe.teachers] + [AVG_PRED, HIGHEST_CONF]
    names = [*(names if asks_teachers else []), STUDENT]
    names += [] if build.side.compensation is None else [COMPENSATED]
    return make_tally(images.of_pixels, names, run_classes(images, build), build.device, parties)


def column_images(images: ImageSet, start: int, batch: int, build: Build) -> tuple[Tensor, Tensor]:
    """This column's slice of the global batch at `start`: uint8 images `[n, C, H, W]`, and their positions `[n]`."""
    mesh, stop = build.mesh, min(start + batch, len(images))
    low, high = bounds(stop - start, mesh.topology.columns, mesh.topology.column_of(mesh.rank))
    positions = torch.arange(start + low, start + high)
    if len(positions) == 0:
        return torch.zeros(0, images.channels, images.size, images.size, dtype=torch.uint8), positions
    return images.images(positions), positions


def votes(teachers: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Predicted classes `[N]` of each teacher, then of AvgPred and of HighestConf; empty without teachers.

    Of pixels `[N, H, W]`: HighestConf then chooses a teacher for each.

    Args:
        teachers: logits `[N, C]` each, of pixels `[N, C, H, W]`.
        weights: w_k, summing to 1.
    """
    if not teachers:
        return []
    single = [logits_NC.argmax(dim=1) for logits_NC in teachers]
    probs_KNC = torch.stack([tempered_mean([logits_NC], [1.0], 1.0) for logits_NC in teachers])
    average_NC = tempered_mean(teachers, weights, 1.0)
    return [*single, average_NC.argmax(dim=1), lowest_entropy_choice(probs_KNC).argmax(dim=1)]


def run_classes(images: ImageSet, build: Build) -> list[str]:
    """The classes in the run's order; the set's own names where the run has none."""
    return list(reference_classes(build.cards) or build.student_card.classes or images.classes)


def label_order(images: ImageSet, build: Build) -> Tensor | None:
    """From the set's labels to those of the run: a table to index with labels, or None where they agree.

    Raises:
        ValueError: another number of classes, other class names than the run's, or labels of pixels where the run
            classifies images (or the other way round).
    """
    classes, dense = build.recipe.num_classes, build.side.network.dense
    if images.of_pixels != dense:
        found, wanted = ("pixels", "images") if images.of_pixels else ("images", "pixels")
        raise ValueError(
            f"evaluation.dataset: its {found} have labels, but {build.student_card.arch} classifies {wanted}"
        )
    if len(images.classes) != classes:
        raise ValueError(f"evaluation.dataset has {len(images.classes)} classes, but num_classes is {classes}")
    reference = reference_classes(build.cards) or build.student_card.classes
    try:
        order = class_order(images.classes, reference, "of evaluation.dataset")
    except ValueError as error:
        raise ValueError(f"evaluation.dataset: its class names are not the run's ({error})") from error
    if order is None:
        return None
    table = torch.tensor(order).argsort()
    # The label of no class stays what it is.
    return torch.cat([table, torch.arange(classes, IGNORE + 1)]) if dense else table


def check_set(build: Build) -> None:
    """Read the recipe's evaluation images and compare them with the run: what would fail at the end fails now.

    Raises:
        DatasetError, ValueError: as `evaluate`, or the parties do not fit the classes.
        ImportError: what measures these images is not installed.
    """
    spec = build.recipe.evaluation
    if spec is None:
        return
    try:
        images = kept_set(spec.dataset, "test")
    except DatasetError as error:
        raise DatasetError(f"evaluation.dataset: {error}") from error
    label_order(images, build)
    _tally(images, build, True, None)
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
