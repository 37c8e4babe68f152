"""Images to be looked at, wherever they come from: each is seen exactly once, with its label if it has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfkd_dist.data.datasets import DatasetError, FileImageSet, ImageSet, to_image_space, to_uint8
from dfkd_dist.data.readers import SUFFIXES
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.generative import GenerativeSource, Kit


@dataclass(frozen=True)
class Seen:
    """One batch of a collection.

    Args:
        images_NCHW: uint8, or floats in image space (a generator's may leave [0, 1]).
        labels_N: int64 in the order of the collection's classes, -1 where unknown; None where it has no labels.
        numbers_N: int64, each image's own number within the whole collection: what random draws are keyed by.
    """

    images_NCHW: Tensor
    labels_N: Tensor | None
    numbers_N: Tensor

    def floats(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images in image space."""
        images_NCHW = self.images_NCHW.to(device)
        return to_image_space(images_NCHW, dtype) if images_NCHW.dtype == torch.uint8 else images_NCHW.to(dtype)

    def bytes(self) -> Tensor:
        """The images as uint8 on the CPU; what lies outside [0, 1] is clamped."""
        images_NCHW = self.images_NCHW.cpu()
        return images_NCHW if images_NCHW.dtype == torch.uint8 else to_uint8(images_NCHW)


class Collection(ABC):
    """Images of one size.

    Args:
        name: how it is called in tables and pictures.
        classes: names of the labels, or None where there are none.
    """

    def __init__(self, name: str, classes: Sequence[str] | None) -> None:
        self.name, self.classes = name, None if classes is None else tuple(classes)

    @abstractmethod
    def __len__(self) -> int:
        """How many there are; files that cannot be decoded may lessen what is seen of a set of shards."""

    @abstractmethod
    def batches(self, batch: int) -> Iterator[Seen]:
        """Every image once, in the same order at every call, at most `batch` at a time.

        Raises:
            DatasetError: images cannot be read.
        """

    @abstractmethod
    def part(self, count: int, seed: int = 0) -> Collection:
        """`count` of them (all, where there are no more), chosen by `seed` and their numbers, in their own order."""

    def rest(self) -> Collection | None:
        """What a selection left out of the set it was made from; None where this is no selection."""
        return None


def chosen(numbers_N: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the numbers, or all of them, in ascending order: a uniformly random choice that `seed` fixes."""
    if count < 1:
        raise ValueError(f"images to choose: expected at least 1, found {count}")
    if count >= len(numbers_N):
        return numbers_N
    order = Randomness(seed).permutation("look/part", len(numbers_N))
    return numbers_N[order[:count].sort().values]


class SetCollection(Collection):
    """A labelled image set, or a part of it.

    Args:
        images: the set.
        name: as in `Collection`.
        labelled: False hides the labels. Those of pixels are none of images.
        numbers_N: int64 positions, ascending; None takes all.
    """

    def __init__(self, images: ImageSet, name: str, *, labelled: bool = True, numbers_N: Tensor | None = None) -> None:
        super().__init__(name, images.classes if labelled and not images.of_pixels else None)
        self.images = images
        self.numbers_N = torch.arange(len(images)) if numbers_N is None else numbers_N

    def __len__(self) -> int:
        return len(self.numbers_N)

    def batches(self, batch: int) -> Iterator[Seen]:
        """See Collection."""
        for numbers_n in self.numbers_N.split(batch):
            labels_n = None if self.classes is None else self.images.labels_N[numbers_n]
            yield Seen(self.images.images(numbers_n), labels_n, numbers_n)

    def part(self, count: int, seed: int = 0) -> Collection:
        """See Collection."""
        numbers_N, labelled = chosen(self.numbers_N, count, seed), self.classes is not None
        return SetCollection(self.images, self.name, labelled=labelled, numbers_N=numbers_N)


def folder_collection(folder: Path, size: int, channels: int, name: str | None = None) -> Collection:
    """Every jpg and png file below a folder, without labels, in the order of the paths.

    Raises:
        DatasetError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DatasetError(f"{folder}: found no images; looked for files in {SUFFIXES}")
    labels_N = torch.zeros(len(paths), dtype=torch.int64)
    images = FileImageSet(paths, labels_N, ["unknown"], size=size, channels=channels)
    return SetCollection(images, name or str(folder), labelled=False)


class GeneratorCollection(Collection):
    """Images made by generators, `count` in all, as evenly from each as it divides.

    The images are those of `GenerativeSource.sample`: from latents that training never draws, not augmented. They are
    made in slices of nearly `batch`, because batch norm sees a slice; so they do not depend on how they are looked at.

    Args:
        source: whose generators they are.
        kits: which of them.
        count: images of all of them together.
        batch: the run's batch.
        name: as in `Collection`.
    """

    def __init__(self, source: GenerativeSource, kits: Sequence[Kit], count: int, batch: int, name: str) -> None:
        super().__init__(name, None)
        if count < len(kits):
            raise ValueError(f"{name}: expected at least one image of each of {len(kits)} generators, found {count}")
        self.source, self.kits, self.count, self.batch = source, list(kits), count, batch

    def __len__(self) -> int:
        return self.count

    def batches(self, batch: int) -> Iterator[Seen]:
        """See Collection."""
        for place, kit in enumerate(self.kits):
            low, high = bounds(self.count, len(self.kits), place)
            slices = -(-(high - low) // self.batch)
            for number in range(slices):
                start, stop = bounds(high - low, slices, number)
                images_NCHW = self.source.sample(kit, stop - start, start)
                numbers_N = torch.arange(low + start, low + stop)
                for images_nCHW, numbers_n in zip(images_NCHW.split(batch), numbers_N.split(batch), strict=True):
                    yield Seen(images_nCHW, None, numbers_n)

    def part(self, count: int, seed: int = 0) -> Collection:
        """The first so many of each generator: every image is as random as every other."""
        fewer = max(min(count, self.count), len(self.kits))
        return GeneratorCollection(self.source, self.kits, fewer, self.batch, self.name)
