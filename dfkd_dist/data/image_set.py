"""Labelled image sets: one interface, kept in memory or decoded from files when asked for.

Sets whose pixels are labelled are in `data.mask_set`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dfkd_dist.data.decode import decode_many


class ImageSet(ABC):
    """Labelled images of one size, for training teachers and for evaluation.

    labels_N: int64 class indices; classes: their names; size: side in pixels; channels: 1 (grey) or 3 (RGB).
    """

    of_pixels = False
    """Whether every pixel has a label, rather than every image."""

    def __init__(self, labels_N: Tensor, classes: Sequence[str], *, size: int, channels: int) -> None:
        """Check the labels; ValueError if they are not int64 `[N]` in 0 .. len(classes) - 1."""
        if labels_N.ndim != 1 or labels_N.dtype != torch.int64:
            raise ValueError(f"labels_N: expected int64 [N], found {labels_N.dtype} {tuple(labels_N.shape)}")
        if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < len(classes):
            found = f"{int(labels_N.min())} .. {int(labels_N.max())}"
            raise ValueError(f"labels_N: expected 0 .. {len(classes) - 1}, found {found}")
        self.labels_N = labels_N
        self.classes = list(classes)
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels_N)

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """The images at int64 positions `[n]` as uint8 `[n, channels, size, size]`, in that order."""

    def labels(self, indices: Tensor) -> Tensor:
        """Their labels: int64 `[n]`, of a set with labelled pixels `[n, size, size]`."""
        return self.labels_N[indices]


class MemoryImageSet(ImageSet):
    """All images in one uint8 tensor."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, classes: Sequence[str]) -> None:
        """Keep uint8 images `[N, C, S, S]`; ValueError if they are not that or not one for each label."""
        count, channels, height, width = images_NCHW.shape
        if images_NCHW.dtype != torch.uint8 or height != width or count != len(labels_N):
            found = f"{images_NCHW.dtype} {tuple(images_NCHW.shape)} and {len(labels_N)} labels"
            raise ValueError(f"images_NCHW: expected uint8 square images, one for each label, found {found}")
        super().__init__(labels_N, classes, size=height, channels=channels)
        self.images_NCHW = images_NCHW

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return self.images_NCHW[indices]


class FileImageSet(ImageSet):
    """Image files, read and decoded each time they are asked for: for sets that do not fit in memory."""

    def __init__(
        self, paths: Sequence[str], labels_N: Tensor, classes: Sequence[str], *, size: int, channels: int
    ) -> None:
        """Keep the paths; ValueError if they do not match the labels in number."""
        if len(paths) != len(labels_N):
            raise ValueError(f"paths: expected one for each of {len(labels_N)} labels, found {len(paths)}")
        super().__init__(labels_N, classes, size=size, channels=channels)
        self.paths = list(paths)

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet; raises DatasetError naming the file that cannot be read."""
        paths = [self.paths[i] for i in indices.tolist()]
        return decode_many(
            len(paths),
            lambda i: np.fromfile(paths[i], dtype=np.uint8),
            lambda i: paths[i],
            size=self.size,
            channels=self.channels,
        )
