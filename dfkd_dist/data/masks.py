"""Folders of images with maps of labels beside them, as NYUv2 and other segmentation sets are commonly kept.

    root/train/image/0001.jpg     root/train/label/0001.png
    root/test/image/0002.jpg      root/test/label/0002.png      (root/val likewise, where there is one)

Images are jpg, png or npy: uint8 `[H, W, 3]`, or floats in 0 .. 1. Maps of labels have the image's name and its size
and are grey png files of 8 or 16 bits, or npy files of whole numbers `[H, W]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.decode import PIXEL_LIMIT, decode_one, image_shape
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.mask_set import IGNORE, MaskSet, mask_to_square
from dfkd_dist.data.part import Part, Split
from dfkd_dist.data.pixels import convert_images

IMAGE, LABEL = "image", "label"
IMAGE_SUFFIXES, LABEL_SUFFIXES = (".jpg", ".jpeg", ".png", ".npy"), (".png", ".npy")
_GREY, _DEPTHS = 0, (8, 16)
"""A png's colour type and its bits a sample. Fewer bits would be stretched over 0 .. 255 in decoding."""


def read_masks(spec: DatasetSpec, split: Split) -> Part:
    """The pairs of a split's folder; without a `val` folder `val_fraction` of the train images is for validation.

    A label v means class v - `offset`; 255, negative numbers and those below `offset` mean none. All images are
    decoded once and kept.
    """
    root, classes = Path(str(spec.path)), list(spec.classes or [])
    carve = split == "train" or (split == "val" and not (root / "val").is_dir())
    folder = root / ("train" if carve else split)
    pairs = _pairs(folder / IMAGE, folder / (spec.labels or LABEL))

    def make(positions: Tensor) -> MaskSet:
        images_NCHW = torch.empty(len(positions), spec.channels, spec.size, spec.size, dtype=torch.uint8)
        masks_NHW = torch.empty(len(positions), spec.size, spec.size, dtype=torch.uint8)
        for row, place in enumerate(positions.tolist()):
            image, label = pairs[place]
            images_NCHW[row], sides = _image(image, spec)
            masks_NHW[row] = _mask(label, spec, sides, len(classes))
        return MaskSet(images_NCHW, masks_NHW, classes)

    unlabelled = torch.zeros(len(pairs), dtype=torch.int64)  # images have no class to stratify by
    carve = carve and not (root / "val").is_dir()
    return Part(torch.arange(len(pairs)), unlabelled, classes, make, carve=carve)


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Images with their maps of labels, by name."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder (kind: masks reads SPLIT/image and SPLIT/LABELS)")
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DatasetError(f"{images}: found no images; allowed are files in {IMAGE_SUFFIXES}")
    of_name = {path.stem: path for path in sorted(labels.iterdir()) if path.suffix.lower() in LABEL_SUFFIXES}
    missing = [path.name for path in found if path.stem not in of_name]
    if missing:
        raise DatasetError(
            f"{labels}: no map of labels for {len(missing)} of {len(found)} images, such as {missing[0]}; "
            f"allowed are files of the same name in {LABEL_SUFFIXES}"
        )
    return [(path, of_name[path.stem]) for path in found]


def _image(path: Path, spec: DatasetSpec) -> tuple[Tensor, tuple[int, int]]:
    """uint8 `[channels, size, size]`, and the height and width of the file."""
    try:
        if path.suffix.lower() != ".npy":
            encoded = np.fromfile(path, dtype=np.uint8)
            return decode_one(encoded, size=spec.size, channels=spec.channels), image_shape(encoded)
        array = _array(path)
        if array.ndim != 3 or array.shape[2] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
            raise ValueError(f"expected uint8 or floats [H, W, 3], found {array.dtype} {array.shape}")
        if array.dtype.kind == "f":
            if not (0 <= array.min() and array.max() <= 1):
                raise ValueError(f"expected floats in 0 .. 1, found {array.min()} .. {array.max()}")
            array = np.rint(array * 255).astype(np.uint8)
        image_1CHW = torch.from_numpy(array).permute(2, 0, 1)[None]
        return convert_images(image_1CHW, size=spec.size, channels=spec.channels)[0], (array.shape[0], array.shape[1])
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        raise DatasetError(f"{path}: not a readable image: {error}") from error


def _mask(path: Path, spec: DatasetSpec, sides: tuple[int, int], classes: int) -> Tensor:
    """uint8 `[size, size]` of classes and `IGNORE`."""
    try:
        raw_HW = _whole_numbers(_array(path)) if path.suffix.lower() == ".npy" else _png(path)
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        raise DatasetError(f"{path}: not a readable map of labels: {error}") from error
    if tuple(raw_HW.shape) != sides:
        raise DatasetError(f"{path}: {tuple(raw_HW.shape)} pixels, but its image has {sides}")
    offset = spec.offset or 0
    ignored = (raw_HW == IGNORE) | (raw_HW < offset)
    class_HW = torch.where(ignored, IGNORE, raw_HW - offset)
    highest = int(torch.where(ignored, 0, class_HW).max())
    if highest >= classes:
        raise DatasetError(
            f"{path}: found label {highest + offset}; allowed: {offset} .. {classes - 1 + offset} (classes, offset) "
            f"and {IGNORE}"
        )
    return mask_to_square(class_HW, spec.size).to(torch.uint8)


def _png(path: Path) -> Tensor:
    """int64 `[H, W]`."""
    encoded = np.fromfile(path, dtype=np.uint8)
    height, width = image_shape(encoded)
    if not 0 < height * width <= PIXEL_LIMIT:
        raise ValueError(f"{height} x {width} pixels, allowed 1 to {PIXEL_LIMIT}")
    if path.suffix.lower() != ".png" or bytes(encoded[1:4]) != b"PNG":
        raise ValueError("not a png file")
    depth, colour = int(encoded[24]), int(encoded[25])
    if colour != _GREY or depth not in _DEPTHS:
        raise ValueError(f"a png of colour type {colour} with {depth} bits; allowed: grey (type 0) with 8 or 16 bits")
    return decode_image(torch.from_numpy(encoded), mode=ImageReadMode.UNCHANGED)[0].long()


def _array(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    if array.size == 0:
        raise ValueError(f"expected pixels, found shape {array.shape}")
    return array


def _whole_numbers(array: NDArray[Any]) -> Tensor:
    """int64 `[H, W]`; some sets keep labels as floats."""
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers [H, W], found {array.dtype} {array.shape}")
    whole = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        raise ValueError("expected whole numbers, found fractions")
    return torch.from_numpy(whole)
