"""What a reader finds before any image is decoded: labels, and how to make an image set of some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import ImageSet
from dfkd_dist.data.splits import stratified_split

Split = Literal["train", "val", "test"]

TEST_FRACTION = 0.2
"""Held out for testing where a data set comes without a split."""
TEST_SEED = 0
VAL_SEED = 1
"""Fixed: which images are test and validation images belongs to the data set, not to the run."""


@dataclass(frozen=True)
class Part:
    """The images from which a split is taken (int64 positions), and how to make an image set of some."""

    positions: Tensor
    labels_N: Tensor
    classes: list[str]
    make: Callable[[Tensor], ImageSet]
    """From positions to an image set of those images."""
    carve: bool
    """Whether validation images are still among `positions`."""
    strata_N: Tensor | None = None
    """What to stratify by, if finer than the labels."""

    def select(self, split: Split, val_fraction: float) -> Tensor:
        """Positions of the split: all, or (train part) without or only the validation images."""
        if not self.carve:
            return self.positions
        strata_N = self.labels_N if self.strata_N is None else self.strata_N
        rest, held = stratified_split(strata_N[self.positions], val_fraction, VAL_SEED)
        return self.positions[held if split == "val" else rest]


def train_or_test(strata_N: Tensor, split: Split, fraction: float = TEST_FRACTION) -> Tensor:
    """Positions of the train part (with validation) or of the test part, for sets without a split."""
    rest, held = stratified_split(strata_N, fraction, TEST_SEED)
    return held if split == "test" else rest


def read_labels(where: str, labels: NDArray[np.generic], images: int, classes: int | None) -> Tensor:
    """Labels as int64, checked against the numbers of images and classes; DatasetError says `where`."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DatasetError(f"{where}: expected integer labels [N], found {labels.dtype} {labels.shape}")
    if len(labels) != images:
        raise DatasetError(f"{where}: expected one label for each of {images} images, found {len(labels)}")
    if images == 0:
        raise DatasetError(f"{where}: expected at least one image, found none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 or more" if classes is None else f"0 .. {classes - 1}"
        raise DatasetError(f"{where}: expected labels {allowed}, found {low} .. {high}")
    return torch.from_numpy(labels.astype(np.int64))
