"""Counting right answers, of images or of pixels; counts of several ranks add up to those of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dfkd_dist.config import SplitSpec
from dfkd_dist.data.mask_set import IGNORE
from dfkd_dist.data.splits import frequent_classes
from dfkd_dist.engine.evaluation import AVG_PRED, COMPENSATED, HIGHEST_CONF, STUDENT, Evaluation, Overlap
from dfkd_dist.parallel.group import Group


class Tally(Protocol):
    """What an evaluation asks of both."""

    def add(self, choices: Sequence[Tensor], labels_n: Tensor) -> None:
        """Count predicted classes, one tensor for each voter, shaped as the labels; perhaps of no image at all."""
        ...

    def sum_(self, group: Group) -> None:
        """Add up the counts of all ranks."""
        ...

    def evaluation(self, split: str) -> Evaluation:
        """What the counts come to."""
        ...


class ImageTally:
    """Right answers by class.

    Args:
        names: of the voters.
        classes: how many.
        device: of the answers.
        parties: also accuracy on each party's frequent classes.
    """

    def __init__(self, names: Sequence[str], classes: int, device: torch.device, parties: SplitSpec | None) -> None:
        self.names, self.parties = list(names), parties
        # One row per voter, and one for the number of images, by class.
        self.counts_VC = torch.zeros(len(names) + 1, classes, dtype=torch.int64, device=device)

    def add(self, choices: Sequence[Tensor], labels_n: Tensor) -> None:
        """See Tally."""
        classes = self.counts_VC.shape[1]
        for row, choice_n in enumerate(choices):
            self.counts_VC[row] += torch.bincount(labels_n[choice_n == labels_n], minlength=classes)
        self.counts_VC[-1] += torch.bincount(labels_n, minlength=classes)

    def sum_(self, group: Group) -> None:
        """See Tally."""
        group.sum_(self.counts_VC)

    def evaluation(self, split: str) -> Evaluation:
        """See Tally."""
        counts_VC = self.counts_VC.cpu()
        overall = {name: percent(row, counts_VC[-1]) for name, row in zip(self.names, counts_VC, strict=False)}
        frequent: dict[str, list[float | None]] = {}
        if self.parties is not None:
            blocks = frequent_classes(counts_VC.shape[1], self.parties.parties)
            for name, row in zip(self.names, counts_VC, strict=False):
                frequent[name] = [percent(row[block], counts_VC[-1][block]) for block in blocks]
        return _evaluation(split, int(counts_VC[-1].sum()), overall, frequent, {})


class PixelTally:
    """Confusions between classes, and what torchmetrics makes of them; pixels labelled `IGNORE` do not count.

    Args:
        names: of the voters.
        classes: names of the classes.
        device: of the answers.

    Raises:
        ImportError: the extra is not installed (says how to install it).
    """

    def __init__(self, names: Sequence[str], classes: Sequence[str], device: torch.device) -> None:
        self.names, self.classes = list(names), list(classes)
        self.metrics = [_jaccard(len(classes)).to(device) for _ in names]
        self.images = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, choices: Sequence[Tensor], labels_n: Tensor) -> None:
        """See Tally."""
        for metric, choice_n in zip(self.metrics, choices, strict=True):
            metric.update(choice_n, labels_n)
        self.images += len(labels_n)

    def sum_(self, group: Group) -> None:
        """See Tally."""
        summed_VCC = group.sum_(torch.stack([metric.confmat for metric in self.metrics]))
        for metric, confusion_CC in zip(self.metrics, summed_VCC, strict=True):
            metric.confmat = confusion_CC
        group.sum_(self.images)

    def evaluation(self, split: str) -> Evaluation:
        """See Tally."""
        overlaps = {name: self._overlap(metric) for name, metric in zip(self.names, self.metrics, strict=True)}
        confusions = {name: metric.confmat.cpu() for name, metric in zip(self.names, self.metrics, strict=True)}
        overall = {name: percent(found_CC.diagonal(), found_CC) for name, found_CC in confusions.items()}
        return _evaluation(split, int(self.images), overall, {}, overlaps)

    def _overlap(self, metric: Any) -> Overlap:
        found_C = 100.0 * metric.compute().double().cpu()
        occurs_C = (metric.confmat.sum(dim=0) + metric.confmat.sum(dim=1) > 0).cpu()
        iou = [value if occurs else None for value, occurs in zip(found_C.tolist(), occurs_C.tolist(), strict=True)]
        known = [value for value in iou if value is not None]
        miou = sum(known) / len(known) if known else 0.0
        return Overlap(miou, dict(zip(self.classes, iou, strict=True)))


def _jaccard(classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise ImportError(
            "mIoU needs torchmetrics, which is not installed: pip install 'dfkd-dist[metrics]'"
        ) from error
    # Ranks are our own business: each image counts once, and its confusions are summed by `sum_`.
    return MulticlassJaccardIndex(
        num_classes=classes, average="none", ignore_index=IGNORE, validate_args=False, sync_on_compute=False
    )


def make_tally(
    of_pixels: bool, names: Sequence[str], classes: Sequence[str], device: torch.device, parties: SplitSpec | None
) -> Tally:
    """The one for such labels; `parties` mean nothing to pixels."""
    return PixelTally(names, classes, device) if of_pixels else ImageTally(names, len(classes), device, parties)


def _evaluation(
    split: str,
    samples: int,
    overall: dict[str, float | None],
    frequent: dict[str, list[float | None]],
    overlaps: dict[str, Overlap],
) -> Evaluation:
    known = {name: value for name, value in overall.items() if value is not None}
    if STUDENT not in known:
        raise ValueError(f"evaluation.dataset: no pixel of the {split} images has a label of a class")
    teachers = {name.removeprefix("teacher/"): v for name, v in known.items() if name.startswith("teacher/")}
    ensembles = {name: known[name] for name in (AVG_PRED, HIGHEST_CONF) if name in known}
    return Evaluation(split, samples, known[STUDENT], teachers, ensembles, frequent, known.get(COMPENSATED), overlaps)


def percent(part: Tensor, whole: Tensor) -> float | None:
    """100 times the ratio of the sums; None of nothing."""
    total = int(whole.sum())
    return 100.0 * float(part.sum()) / total if total else None
