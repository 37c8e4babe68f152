"""Labelled image sets for training teachers and for evaluation, from a spec and the name of a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.archives import read_jpg_npz, read_npz
from dfkd_dist.data.compiled.image_set import read_compiled_set
from dfkd_dist.data.digits_on_photos import read_digits_on_photos
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import FileImageSet, ImageSet, MemoryImageSet
from dfkd_dist.data.mask_set import MaskSet
from dfkd_dist.data.masks import read_masks
from dfkd_dist.data.part import Part, Split
from dfkd_dist.data.pixels import to_image_space, to_uint8
from dfkd_dist.data.readers import read_digits, read_folder, read_torchvision

__all__ = [
    "DatasetError",
    "FileImageSet",
    "ImageSet",
    "MaskSet",
    "MemoryImageSet",
    "Split",
    "load_image_set",
    "to_image_space",
    "to_uint8",
]

READERS: dict[str, Callable[[DatasetSpec, Split], Part]] = {
    "digits": read_digits,
    "npz": read_npz,
    "jpg_npz": read_jpg_npz,
    "folder": read_folder,
    "torchvision": read_torchvision,
    "masks": read_masks,
    "digits_on_photos": read_digits_on_photos,
    "ffcv": read_compiled_set,
}


def load_image_set(spec: DatasetSpec, split: Split) -> ImageSet:
    """The images of a split at the spec's size and channels, in memory (`kind: folder`: decoded on demand).

    `val` is a fixed part of the train images, `val_fraction` of each class (where pixels have the labels: of the
    images), unless a folder brings its own.
    `limit` keeps the first n images of the split. Which images are in which split depends on the data and on
    `val_fraction` only. Raises DatasetError (a ValueError) for data that is missing, malformed or empty; it
    names the file and the key or index.
    """
    if split not in get_args(Split):
        raise DatasetError(f"split: found {split!r}, allowed are {list(get_args(Split))}")
    if spec.kind not in READERS:
        raise DatasetError(f"kind: found {spec.kind!r}, allowed are {sorted(READERS)}")
    if spec.domains is not None and spec.kind != "jpg_npz":
        raise DatasetError(f"domains: only kind jpg_npz has domains, found kind {spec.kind}")
    part = READERS[spec.kind](spec, split)
    positions = part.select(split, spec.val_fraction)[: spec.limit]
    if len(positions) == 0:
        source = spec.path or spec.name or spec.kind
        raise DatasetError(f"{source}: split {split!r} is empty (val_fraction is {spec.val_fraction})")
    return part.make(positions)
