"""Contact sheets: a pool's images in one row per predicted class, the most confident first (MosaicKD Fig. 4)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from dfkd_dist.engine.figures import PADDING, save_png
from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.networks import Judge

PER_CLASS, MOST_ROWS = 10, 100
"""Images in a row; rows of a sheet, unless classes are named."""
TEXT_HEIGHT, MARGIN = 12, 4
"""Pixels of a class's name, and around it."""
SMALLEST = 32
"""Images with fewer pixels on a side are shown enlarged by a whole number, pixel by pixel."""

_Kept = tuple[float, int, Tensor]


@dataclass
class Row:
    """The most confident images of one class.

    Args:
        name: the class.
        images: uint8 `[n, C, H, W]`, most confident first.
        confidence: the judge's probability of each.
        found: how many images of the pool the judge put in this class.
    """

    name: str
    images: Tensor
    confidence: list[float] = field(default_factory=list)
    found: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"class": self.name, "found": self.found, "confidence": self.confidence}


def sheet_rows(
    pool: Collection,
    judge: Judge,
    *,
    per_class: int = PER_CLASS,
    classes: Sequence[str] | None = None,
    batch: int = 256,
) -> list[Row]:
    """The images of which a judge is surest, by the class that it puts them in; every image is looked at once.

    Args:
        pool: the images; equally sure ones keep its order.
        judge: who decides.
        per_class: images of a row.
        classes: names of the rows in their order; None: the judge's classes, the first 100 of more.
        batch: images at a time.

    Raises:
        ValueError: an unknown class, or there is no image.
    """
    names = judge.classes[:MOST_ROWS] if classes is None else tuple(classes)
    unknown = [name for name in names if name not in judge.classes]
    if unknown:
        raise ValueError(f"sheet: unknown classes {unknown}; allowed: {', '.join(judge.classes)}")
    kept: dict[int, list[_Kept]] = {judge.classes.index(name): [] for name in names}
    found_C = torch.zeros(len(judge.classes), dtype=torch.int64)
    places, shape = itertools.count(), None
    for seen in pool.batches(batch):
        choice_N, confidence_N = judge(seen)
        found_C += torch.bincount(choice_N, minlength=len(judge.classes))
        pixels = seen.bytes()
        shape = pixels.shape[1:]
        for image, c, sure in zip(pixels, choice_N.tolist(), confidence_N.tolist(), strict=True):
            if c in kept:
                _keep(kept[c], sure, -next(places), image, per_class)
    if shape is None or int(found_C.sum()) == 0:
        raise ValueError(f"sheet of {pool.name}: found no images")
    empty = torch.zeros(0, *shape, dtype=torch.uint8)
    rows = []
    for c, best in kept.items():
        best.sort(key=lambda item: item[:2], reverse=True)
        images = torch.stack([image for _, _, image in best]) if best else empty
        rows.append(Row(judge.classes[c], images, [sure for sure, _, _ in best], int(found_C[c])))
    return rows


def _keep(best: list[_Kept], sure: float, place: int, image: Tensor, limit: int) -> None:
    """A heap of the largest; places differ, so images are never compared."""
    if len(best) < limit:
        heapq.heappush(best, (sure, place, image.clone()))  # a view would keep its whole batch in memory
    elif (sure, place) > best[0][:2]:
        heapq.heapreplace(best, (sure, place, image.clone()))


def draw_sheet(rows: Sequence[Row], per_class: int = PER_CLASS) -> Tensor:
    """One picture, uint8 `[3, height, width]`: names at the left, images at the right, white where there are none."""
    shape = rows[0].images.shape[1:]
    cells = []
    for row in rows:
        missing = torch.full((per_class - len(row.images), *shape), 255, dtype=torch.uint8)
        cells.append(torch.cat([row.images, missing]))
    scale = max(1, -(-SMALLEST // shape[1]))
    pixels = torch.cat(cells).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    grid = make_grid(pixels, nrow=per_class, padding=PADDING, pad_value=255)
    names = _names([row.name for row in rows], scale * shape[1] + PADDING, grid.shape[1])
    return torch.cat([names, grid], dim=2)


def save_sheet(rows: Sequence[Row], path: Path, per_class: int = PER_CLASS) -> Path:
    """`draw_sheet` as PNG; returns the path."""
    save_png(path, draw_sheet(rows, per_class))
    return path


def _names(names: Sequence[str], pitch: int, height: int) -> Tensor:
    """Class names in black on white, one every `pitch` pixels: uint8 `[3, height, width]`."""
    from PIL import Image, ImageDraw, ImageFont  # torchvision brings it along

    font = ImageFont.load_default(min(TEXT_HEIGHT, max(pitch - PADDING, 6)))
    width = 2 * MARGIN + max(int(font.getlength(name)) + 1 for name in names)
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    for place, name in enumerate(names):
        draw.text((MARGIN, PADDING + place * pitch + pitch // 2), name, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1).contiguous()
