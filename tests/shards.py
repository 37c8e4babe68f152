"""Small real sets of shards for tests: 5 unequal shards of 8 .. 16 px jpg and png images, in milliseconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_jpeg, encode_png

from dfkd_dist.data.shards.manifest import write_manifest
from dfkd_dist.data.shards.tar import NO_LABEL, Sample, write_shard
from tests.image_data import pictures

PER_SHARD = (7, 12, 5, 9, 10)


def small_pictures(count: int, *, seed: int = 0, channels: int = 3) -> list[torch.Tensor]:
    """uint8 `[channels, H, W]` with H and W between 8 and 16, different from image to image."""
    sides = [(8 + (3 * i) % 9, 8 + (5 * i) % 9) for i in range(count)]
    return [pictures(1, channels, *side, seed=seed * 100_003 + i)[0] for i, side in enumerate(sides)]


def encoded(image_CHW: torch.Tensor, suffix: str) -> bytes:
    """A png keeps every pixel; a jpg nearly does."""
    data = encode_png(image_CHW) if suffix == "png" else encode_jpeg(image_CHW, quality=95)
    return data.numpy().tobytes()


def write_shards(
    folder: Path,
    images: int | Sequence[torch.Tensor | bytes] = sum(PER_SHARD),
    *,
    per_shard: int | Sequence[int] = PER_SHARD,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    suffix: str | None = None,
    seed: int = 0,
) -> Path:
    """Write shards with a manifest into `folder` (made if missing) and return it.

    Args:
        folder: where to.
        images: how many to make up, or uint8 `[C, H, W]` tensors, or whole files' bytes (broken ones too).
        per_shard: one size for all shards, or the sizes of the first ones, repeated as long as there are images.
        labels: one for each image, -1 for unknown; None: image i has label i % 5. `[]` writes none.
        classes: names of the labels; None: "0", "1", ...
        suffix: "jpg" or "png" for all tensors; None alternates. Bytes count as this suffix, or as jpg.
        seed: of made up images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = small_pictures(images, seed=seed) if isinstance(images, int) else list(images)
    numbers = [i % 5 for i in range(len(given))] if labels is None else list(labels) or [NO_LABEL] * len(given)
    samples = [_sample(i, image, numbers[i], suffix) for i, image in enumerate(given)]
    sizes = [per_shard] if isinstance(per_shard, int) else list(per_shard)
    entries: list[dict[str, Any]] = []
    start = 0
    while start < len(samples):
        size = sizes[len(entries) % len(sizes)]
        entries.append(write_shard(folder / f"{len(entries):06d}.tar", samples[start : start + size]))
        start += size
    highest = max(numbers, default=NO_LABEL)
    names = [str(i) for i in range(highest + 1)] if classes is None else list(classes)
    write_manifest(folder, entries, names if highest >= 0 else None)
    return folder


def _sample(i: int, image: torch.Tensor | bytes, label: int, suffix: str | None) -> Sample:
    if isinstance(image, bytes):
        return Sample(f"{i:06d}", suffix or "jpg", image, label)
    kind = suffix or ("jpg", "png")[i % 2]
    return Sample(f"{i:06d}", kind, encoded(image, kind), label)
