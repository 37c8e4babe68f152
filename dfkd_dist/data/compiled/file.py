"""The FFCV file itself, as one process fills it: how images are stored, and where they land."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.compiled.beton import FIELDS, SAMPLE
from dfkd_dist.data.compiled.extra import importing_ffcv
from dfkd_dist.data.stream.order import subset

_PAGE = 2**23
"""FFCV's usual bytes of a page; images never cross two pages, so it holds many of them."""

Mode = Literal["raw", "jpg", "proportion"]


@dataclass(frozen=True)
class Storing:
    """How images are stored.

    Args:
        mode: raw pixels, jpg, or jpg for a proportion of the samples.
        quality: of jpg.
        share: proportion: how many become jpg; chosen by each sample's own number, so always the same ones.
    """

    mode: Mode = "raw"
    quality: int = 90
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: found {self.quality}, allowed are 1 to 100")
        if not 0 < self.share < 1:
            raise ValueError(f"share: found {self.share:g}, allowed is a number between 0 and 1")


class Stored(NamedTuple):
    """An image as it lies in the file; `mode` is raw or jpg."""

    mode: str
    data: NDArray[np.uint8]


def encoder(storing: Storing, samples: int) -> Callable[[int, NDArray[np.uint8]], Stored]:
    """From a sample's id and its pixels to what is stored."""
    with importing_ffcv():
        from ffcv.fields.rgb_image import encode_jpeg
    share = {"raw": 0.0, "jpg": 1.0, "proportion": storing.share}[storing.mode]
    as_jpg_N = subset(samples, share, seed=0)

    def encode(sample: int, image_HWC: NDArray[np.uint8]) -> Stored:
        if as_jpg_N[sample]:
            return Stored("jpg", encode_jpeg(image_HWC, storing.quality))
        return Stored("raw", image_HWC.reshape(-1))

    return encode


class File:
    """FFCV's file, filled by one process: its header, its pages, its tables.

    Args:
        path: where to.
        most: samples at most.
        size: side of the images in pixels.
    """

    def __init__(self, path: Path, most: int, size: int) -> None:
        with importing_ffcv():
            from ffcv.fields import IntField, RGBImageField
            from ffcv.fields.rgb_image import IMAGE_MODES
            from ffcv.memory_allocator import MemoryAllocator
            from ffcv.writer import DatasetWriter

        self.size, self.count = size, 0
        self._modes = {name: int(number) for name, number in IMAGE_MODES.items()}
        page = _PAGE
        while page < 8 * size * size:  # a raw image, or a jpg that is larger than that
            page *= 2
        fields = dict(zip(FIELDS, (RGBImageField(), IntField(), IntField()), strict=True))
        self._writer = DatasetWriter(str(path), fields, page_size=page, num_workers=1)
        self._writer.num_samples = most
        self._writer.prepare()
        # It would keep these numbers in /dev/shm for its processes, and that is small in containers.
        self._writer.metadata_sm.close()
        self._writer.metadata_sm.unlink()
        self._samples = np.zeros(most, SAMPLE)
        self._pages = MemoryAllocator(str(path), self._writer.data_region_start, page)

    def __enter__(self) -> None:
        self._pages.__enter__()

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._pages.__exit__(*exception)  # writes the last page
        else:
            self._pages.fp.close()

    def add(self, sample: int, label: int, stored: Stored) -> None:
        """The next image."""
        self._pages.set_current_sample(self.count)
        place, room = self._pages.malloc(stored.data.nbytes)
        room[:] = stored.data
        image = (self._modes[stored.mode], self.size, self.size, place)
        self._samples[self.count] = (image, label, sample)
        self.count += 1

    def finish(self) -> None:
        """Write the tables. What was reserved for samples that did not come is left unused."""
        self._writer.header["num_samples"] = self.count
        self._writer.metadata_sm = SimpleNamespace(buf=self._samples.view(np.uint8).data)
        self._writer.finalize(self._pages.allocations)
        with open(self._writer.fname, "rb") as file:
            os.fsync(file.fileno())
