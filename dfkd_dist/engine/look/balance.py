"""How a pool of images is spread over classes, as a teacher sees it (MosaicKD Fig. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.fid import FidByClass
from dfkd_dist.engine.look.networks import Judge
from dfkd_dist.engine.look.plots import new_figure, save_figure

SHOWN = 20
"""Classes in the printed table; with more, the first and the last half of so many."""


@dataclass(frozen=True)
class Balance:
    """Images by predicted class.

    Args:
        pool: what was looked at.
        judge: who predicted.
        classes: names.
        counts: images that the judge put in each class.
    """

    pool: str
    judge: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def images(self) -> int:
        """All of them."""
        return sum(self.counts)

    @property
    def missing(self) -> list[str]:
        """Classes that no image was put in."""
        return [name for name, count in zip(self.classes, self.counts, strict=True) if count == 0]

    @property
    def evenness(self) -> float:
        """Entropy of the shares over log C: 1 where every class has as many, 0 where one has all."""
        shares = [count / self.images for count in self.counts if count]
        if len(self.counts) < 2:
            return 1.0
        return -sum(p * math.log(p) for p in shares) / math.log(len(self.counts)) + 0.0

    def ranking(self) -> list[tuple[int, int, float]]:
        """(class, images, percent), largest first; equal ones in class order."""
        order = sorted(range(len(self.counts)), key=lambda c: (-self.counts[c], c))
        return [(c, self.counts[c], 100.0 * self.counts[c] / max(self.images, 1)) for c in order]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `classes` in order of their share."""
        ranked = [
            {"class": self.classes[c], "index": c, "images": count, "percent": percent}
            for c, count, percent in self.ranking()
        ]
        return {
            "pool": self.pool,
            "judge": self.judge,
            "images": self.images,
            "evenness": self.evenness,
            "missing_classes": len(self.missing),
            "classes": ranked,
        }


def class_balance(pool: Collection, judge: Judge, *, batch: int = 256) -> Balance:
    """Histogram of a judge's predictions over a pool, every image once.

    Raises:
        ValueError: there is no image; DatasetError: images cannot be read.
    """
    counts_C = torch.zeros(len(judge.classes), dtype=torch.int64)
    for seen in pool.batches(batch):
        counts_C += torch.bincount(judge(seen)[0], minlength=len(judge.classes))
    if int(counts_C.sum()) == 0:
        raise ValueError(f"class balance of {pool.name}: found no images")
    return Balance(pool.name, judge.name, judge.classes, tuple(counts_C.tolist()))


def draw_balance(balance: Balance, path: Path, by_class: FidByClass | None = None) -> Path:
    """Percentages as bars, largest first, with each class's FID on a second axis where it is given.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ranked = balance.ranking()
    places = list(range(len(ranked)))
    figure = new_figure((max(6.0, min(0.12 * len(ranked) + 3.0, 40.0)), 4.0))
    axes = figure.add_subplot()
    axes.bar(places, [percent for _, _, percent in ranked], width=0.9, color="C0", label="share of images")
    axes.axhline(100.0 / len(ranked), color="0.5", linewidth=0.8, linestyle="--", label="even")
    axes.set_xlabel(f"class as {balance.judge} sees it, by share")
    axes.set_ylabel("images (%)")
    if len(ranked) <= 2 * SHOWN:
        axes.set_xticks(places, [balance.classes[c] for c, _, _ in ranked], rotation=90, fontsize="small")
    if by_class is not None:
        values = [by_class.by_class[c].value for c, _, _ in ranked]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        right = axes.twinx()
        right.plot(
            [p for p, _ in known], [v for _, v in known], ".-", color="C1", linewidth=0.8, label="FID of the class"
        )
        right.set_ylabel("FID")
        right.set_ylim(bottom=0)
        right.legend(loc="upper right", bbox_to_anchor=(1.0, 0.86), fontsize="small")
    axes.set_title(f"{balance.pool}: {balance.images} images", fontsize="medium")
    axes.legend(loc="upper right", fontsize="small")
    return save_figure(figure, path)
