"""A digit pasted on a photograph, each pixel labelled with the digit or as background: real images, drawn labels.

A set for segmentation that anybody can make: handwritten digits, turned and scaled, in a light or a dark colour over
photographs. What is drawn is a function of the image's number alone, so a split is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.archives import Archive, encoded_images, plain_images
from dfkd_dist.data.decode import decode_many
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.mask_set import MaskSet
from dfkd_dist.data.part import Part, Split, read_labels
from dfkd_dist.data.pixels import CHUNK, to_grey

CLASSES = ["background", *(str(digit) for digit in range(10))]
COUNTS = {"train": 10_000, "test": 2_000}
KEYS = {"train": 9001, "test": 9002}
"""Of the counter-based draws: fixed, as the set is."""
EVERY = 5
"""Photographs whose number is a multiple of it are for testing."""
SCALE, CENTRE, TURN = (0.75, 1.0), (0.4, 0.6), 15.0
"""Side and centre of a digit's box in sides of the image; largest turn in degrees."""
_DRAWS = 12
"""Photograph, flip, digit, scale, two of the centre, turn, three of the colour; a multiple of Philox's four."""


@dataclass(frozen=True)
class _Materials:
    """Digits `[M, 1, H, W]` with their labels, and photographs; all uint8 but the labels."""

    digits_M1HW: Tensor
    labels_M: Tensor
    photos: list[np.ndarray]
    where: str


def read_digits_on_photos(spec: DatasetSpec, split: Split) -> Part:
    """10,000 train and 2,000 test images; digits of `path` (`train_x`, `train_y` ...) on the photographs of `photos`.

    `photos` holds jpg files as `train_bytes, train_offsets`, and may say in `photo_id` which of them are parts of one
    photograph: no photograph is in both splits.
    """
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    materials = _materials(spec, part)
    draws_ND = _uniforms(part)

    def make(positions: Tensor) -> MaskSet:
        images, masks = [], []
        for chosen in positions.split(CHUNK):
            images_nCHW, masks_nHW = _drawn(materials, draws_ND[chosen], spec.size)
            images.append(images_nCHW if spec.channels == 3 else to_grey(images_nCHW))
            masks.append(masks_nHW)
        return MaskSet(torch.cat(images), torch.cat(masks), CLASSES)

    unlabelled = torch.zeros(COUNTS[part], dtype=torch.int64)  # images have no class to stratify by
    return Part(torch.arange(COUNTS[part]), unlabelled, CLASSES, make, carve=part == "train")


def _materials(spec: DatasetSpec, part: Literal["train", "test"]) -> _Materials:
    with Archive(str(spec.path)) as archive:
        digits = plain_images(archive, f"{part}_x")
        if digits.shape[1] != 1:
            raise DatasetError(f"{spec.path}: key '{part}_x': expected grey digits, found {digits.shape[1]} channels")
        labels_M = read_labels(f"{spec.path}: key '{part}_y'", archive.read(f"{part}_y"), len(digits), 10)
    with Archive(str(spec.photos)) as archive:
        photos = encoded_images(archive, "train")
        ids = archive.read("photo_id") if "photo_id" in archive else np.arange(len(photos))
    if ids.shape != (len(photos),) or not np.issubdtype(ids.dtype, np.integer):
        raise DatasetError(f"{spec.photos}: key 'photo_id': expected {len(photos)} integers, found {ids.shape}")
    own = np.flatnonzero((ids % EVERY == 0) == (part == "test"))
    if len(own) == 0:
        raise DatasetError(f"{spec.photos}: no photograph is left for {part}")
    return _Materials(digits, labels_M, [photos[i] for i in own.tolist()], str(spec.photos))


def _uniforms(part: Literal["train", "test"]) -> Tensor:
    """`[N, _DRAWS]` in [0, 1), float64: raw Philox output, which no version of NumPy changes."""
    raw = np.random.Philox(key=KEYS[part]).random_raw(COUNTS[part] * _DRAWS)
    return torch.from_numpy((raw >> 11) * 2.0**-53).view(COUNTS[part], _DRAWS)


def _drawn(materials: _Materials, draws_nD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """uint8 images `[n, 3, size, size]` and masks `[n, size, size]`."""
    which, flipped, digit = draws_nD[:, :3].unbind(1)
    images = _photos(materials, (which * len(materials.photos)).long(), flipped < 0.5, size)
    chosen_n = (digit * len(materials.labels_M)).long()
    cover_n1HW = _placed(materials.digits_M1HW[chosen_n], draws_nD[:, 3:7].float(), size)
    light_n = images.mean(dim=(1, 2, 3)) < 0.5  # light digits on dark photographs
    tone_n3 = 0.25 * draws_nD[:, 7:10].float()
    colour_n311 = torch.where(light_n[:, None], 1 - tone_n3, tone_n3)[:, :, None, None]
    images = images * (1 - cover_n1HW) + colour_n311 * cover_n1HW
    label_n11 = (materials.labels_M[chosen_n] + 1).to(torch.uint8).view(-1, 1, 1)
    masks = torch.where(cover_n1HW[:, 0] > 0.5, label_n11, torch.zeros_like(label_n11))
    return (images * 255).round().to(torch.uint8), masks


def _photos(materials: _Materials, chosen_n: Tensor, flipped_n: Tensor, size: int) -> Tensor:
    """Floats in [0, 1], `[n, 3, size, size]`."""
    numbers = chosen_n.tolist()
    decoded = decode_many(
        len(numbers),
        lambda i: materials.photos[numbers[i]],
        lambda i: f"{materials.where}: photograph {numbers[i]}",
        size=size,
        channels=3,
    )
    images = decoded.float() / 255
    return torch.where(flipped_n.view(-1, 1, 1, 1), images.flip(3), images)


def _placed(digits_n1HW: Tensor, draws_n4: Tensor, size: int) -> Tensor:
    """How far each pixel is covered by its digit, `[n, 1, size, size]` in 0 .. 1; draws: scale, x, y, turn."""
    low, high = SCALE
    side_n = low + (high - low) * draws_n4[:, 0]
    centre_n2 = 2 * (CENTRE[0] + (CENTRE[1] - CENTRE[0]) * draws_n4[:, 1:3]) - 1
    angle_n = torch.deg2rad((2 * draws_n4[:, 3] - 1) * TURN)
    cos, sin = angle_n.cos() / side_n, angle_n.sin() / side_n
    turn_n22 = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    # From a pixel of the image to a place in the digit's box.
    theta_n23 = torch.cat([turn_n22, -(turn_n22 @ centre_n2[:, :, None])], dim=2)
    grid = F.affine_grid(theta_n23, [len(theta_n23), 1, size, size], align_corners=False)
    return F.grid_sample(digits_n1HW.float() / 255, grid, align_corners=False)
