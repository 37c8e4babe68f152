"""Images with a label for every pixel, in memory; maps of labels change size and place as their images do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfkd_dist.data.image_set import ImageSet
from dfkd_dist.data.pixels import square
from dfkd_dist.losses.distillation import IGNORE

__all__ = ["IGNORE", "MaskSet", "mask_to_square"]


class MaskSet(ImageSet):
    """Images and their maps of labels, in two uint8 tensors.

    classes: the names of labels 0, 1, ...; `IGNORE` marks pixels that belong to none.
    """

    of_pixels = True

    def __init__(self, images_NCHW: Tensor, masks_NHW: Tensor, classes: Sequence[str]) -> None:
        """Keep uint8 images `[N, C, S, S]` and masks `[N, S, S]`; ValueError if they are not that, or for a label."""
        sides = images_NCHW.shape[2:]
        wanted = (torch.uint8, torch.uint8, images_NCHW.shape[:1] + sides)
        if (images_NCHW.dtype, masks_NHW.dtype, masks_NHW.shape) != wanted or sides[0] != sides[1]:
            found = f"{images_NCHW.dtype} {tuple(images_NCHW.shape)}, {masks_NHW.dtype} {tuple(masks_NHW.shape)}"
            raise ValueError(f"images_NCHW, masks_NHW: expected uint8 squares of one size, found {found}")
        labels = torch.unique(masks_NHW).tolist()
        wrong = [label for label in labels if label >= len(classes) and label != IGNORE]
        if len(classes) > IGNORE or wrong:
            raise ValueError(f"masks_NHW: expected 0 .. {min(len(classes), IGNORE) - 1} or {IGNORE}, found {wrong}")
        # Not super().__init__(): there are no labels of images.
        self.classes, self.size, self.channels = list(classes), int(sides[0]), int(images_NCHW.shape[1])
        self.images_NCHW, self.masks_NHW = images_NCHW, masks_NHW

    @property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        """There is none: each pixel has one; ValueError says so."""
        raise ValueError("the pixels of this set have labels, its images have none; it is for segmentation")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images_NCHW)

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return self.images_NCHW[indices]

    def labels(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return self.masks_NHW[indices].long()


def mask_to_square(mask_HW: Tensor, size: int) -> Tensor:
    """`[size, size]`: the nearest label to each pixel of an image that went through `pixels.to_square`."""
    sides, rows, columns = square(mask_HW.shape[0], mask_HW.shape[1], size)
    if sides != tuple(mask_HW.shape):
        # Labels up to 2^24 are whole in fp32.
        resized = F.interpolate(mask_HW[None, None].float(), size=sides, mode="nearest-exact")
        mask_HW = resized[0, 0].to(mask_HW.dtype)
    return mask_HW[rows, columns]
