"""What a set of shards holds: numbers for a person or as JSON, and a sheet of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import write_png

from dfkd_dist.data.decode import decode_one, image_format, image_shape
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import read_range
from dfkd_dist.data.shards.manifest import NO_LABEL, Manifest, read_manifest

HEADERS = 500
"""Images whose headers are read for the statistics of heights and widths."""
_GAP = 2
_WHITE = 255
_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Info:
    """Facts about a set; heights and widths are those of `looked_at` images that are spread evenly over it."""

    path: str
    shards: int
    samples: int
    bytes: int
    image_bytes: int
    classes: dict[str, int]
    unlabelled: int
    formats: dict[str, int]
    """By suffix over the whole set, where the manifest has suffixes; else of the images that were looked at."""
    looked_at: int
    unreadable: int
    sizes: dict[str, list[int]]
    """Least, median and largest of `bytes` (of one image), `height`, `width`."""
    digest: str

    def table(self) -> str:
        """For a person."""
        per_image = self.image_bytes / max(1, self.samples)
        lines = [
            f"{self.path}",
            f"shards    {self.shards:,}",
            f"images    {self.samples:,} ({', '.join(f'{n:,} {kind}' for kind, n in self.formats.items())})",
            f"bytes     {self.bytes:,} in tars, {self.image_bytes:,} of images ({per_image:,.0f} an image)",
        ]
        for name, (least, median, largest) in self.sizes.items():
            lines.append(f"{name:9s} {least:,} / {median:,} / {largest:,} (least / median / largest)")
        if self.unreadable:
            lines.append(
                f"unreadable {self.unreadable} of {self.looked_at} images looked at; `dfkd shards verify` says why"
            )
        lines.append(self._class_lines())
        lines.append(f"sha256    {self.digest} (of the manifest)")
        return "\n".join(lines)

    def _class_lines(self) -> str:
        if not self.classes:
            return "classes   none"
        counts = list(self.classes.items())
        shown = ", ".join(f"{name} {count:,}" for name, count in counts[:_SHOWN_CLASSES])
        more = f", and {len(counts) - _SHOWN_CLASSES} more" if len(counts) > _SHOWN_CLASSES else ""
        unlabelled = f"; {self.unlabelled:,} unlabelled" if self.unlabelled else ""
        return f"classes   {len(counts)}: {shown}{more}{unlabelled}"


def info(where: str | Path) -> Info:
    """Look at a set: its manifest, and the headers of some of its images. Raises DatasetError."""
    manifest = read_manifest(where)
    found, shapes = _looked_at(manifest)
    suffixes = _suffixes(manifest) or found
    sizes = {"bytes": manifest.sizes_N}
    if shapes:
        heights, widths = np.array(shapes).T
        sizes |= {"height": heights, "width": widths}
    counts = np.bincount(manifest.labels_N[manifest.labels_N != NO_LABEL], minlength=len(manifest.classes or ()))
    return Info(
        path=manifest.path,
        shards=len(manifest.shards),
        samples=len(manifest),
        bytes=sum(shard.bytes for shard in manifest.shards),
        image_bytes=int(manifest.sizes_N.sum()),
        classes=dict(zip(manifest.classes or (), counts.tolist(), strict=True)),
        unlabelled=int((manifest.labels_N == NO_LABEL).sum()),
        formats=dict(suffixes.most_common()),
        looked_at=min(HEADERS, len(manifest)),
        unreadable=found["unreadable"],
        sizes={name: [int(values.min()), int(np.median(values)), int(values.max())] for name, values in sizes.items()},
        digest=manifest.digest,
    )


def sheet(where: str | Path, target: Path, *, images: int = 64, side: int = 64, seed: int | None = None) -> None:
    """Write a png of some images, spread evenly over the set, or chosen at random by `seed`, in rows.

    What cannot be decoded is a white square with a black frame. Raises DatasetError for a set without a manifest.
    """
    manifest = read_manifest(where)
    tiles = [_tile(manifest, i, side) for i in _chosen(len(manifest), images, seed).tolist()]
    columns = max(1, round(len(tiles) ** 0.5))
    rows = -(-len(tiles) // columns)
    canvas = torch.full((3, rows * (side + _GAP) + _GAP, columns * (side + _GAP) + _GAP), _WHITE, dtype=torch.uint8)
    for place, tile in enumerate(tiles):
        top, left = (_GAP + (side + _GAP) * step for step in divmod(place, columns))
        canvas[:, top : top + side, left : left + side] = tile
    target.parent.mkdir(parents=True, exist_ok=True)
    write_png(canvas, str(target))


def _tile(manifest: Manifest, i: int, side: int) -> Tensor:
    try:
        # A bytearray, because torch has no tensors that cannot be written to.
        encoded = np.frombuffer(bytearray(_image(manifest, i)), dtype=np.uint8)
        return decode_one(encoded, size=side, channels=3)
    except (ValueError, RuntimeError, OSError):
        tile = torch.zeros(3, side, side, dtype=torch.uint8)
        tile[:, 1:-1, 1:-1] = _WHITE
        return tile


def _chosen(count: int, images: int, seed: int | None) -> NDArray[np.int64]:
    wanted = min(images, count)
    if seed is None:
        return np.linspace(0, count - 1, wanted).astype(np.int64)
    return np.sort(np.random.Generator(np.random.Philox(key=seed)).choice(count, wanted, replace=False))


def _image(manifest: Manifest, i: int) -> bytes:
    shard_n, _ = manifest.where(np.array([i]))
    return read_range(manifest.location(int(shard_n[0])), int(manifest.offsets_N[i]), int(manifest.sizes_N[i]))


def _looked_at(manifest: Manifest) -> tuple[Counter[str], list[tuple[int, int]]]:
    """Formats, and heights and widths, of some images."""
    kinds: Counter[str] = Counter()
    shapes = []
    for i in _chosen(len(manifest), HEADERS, None).tolist():
        try:
            data = _image(manifest, i)
            shapes.append(image_shape(np.frombuffer(data, dtype=np.uint8)))
            kinds[image_format(data)] += 1
        except (DatasetError, ValueError):
            kinds["unreadable"] += 1
    return kinds, shapes


def _suffixes(manifest: Manifest) -> Counter[str]:
    """Of all images; empty where the manifest has none."""
    counts: Counter[str] = Counter()
    for entry in _with_members(manifest):
        counts.update(suffix.lower() for suffix in entry["members"])
    return counts if counts.total() == len(manifest) else Counter()


def _with_members(manifest: Manifest) -> Iterator[dict[str, Any]]:
    return (entry for entry in manifest.entries() if entry.get("members"))
