"""FFCV's own reader for `benchmarks.streaming`, as its documentation shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image


class Files:
    """The jpgs of a folder as (pixels, number)."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "images" / "all").iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.asarray(Image.open(self.paths[i]).convert("RGB")), i


def reader(folder: Path, size: int, mode: str, batch: int, workers: int) -> Callable[[], int]:
    """A function that reads one epoch in random order; `mode` is jpg or raw."""
    path = folder / f"{mode}.beton"
    field = RGBImageField(write_mode=mode, max_resolution=size, jpeg_quality=90)
    DatasetWriter(str(path), {"image": field, "number": IntField()}, num_workers=1).from_indexed_dataset(Files(folder))
    pipeline = [SimpleRGBImageDecoder(), ToTensor(), ToTorchImage(channels_last=False, convert_back_int16=False)]
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        pipelines={"image": pipeline, "number": None},
        drop_last=False,
    )

    def epoch() -> int:
        seen = 0
        for (images_NCHW,) in loader:
            seen += len(images_NCHW)
            images_NCHW[:, 0, 0, 0].sum()
        return seen

    return epoch
