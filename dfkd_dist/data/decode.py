"""Encoded jpg and png bytes to uint8 tensors, with a pixel limit that is checked before decoding."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pixels import convert_images

PIXEL_LIMIT = 2**26
"""Largest height x width that is decoded (8192 x 8192): a small file may claim any size."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPG = b"\xff\xd8"
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_START_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_shape(encoded: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) as a jpg or png file states them; ValueError if it is neither or has no header."""
    data = encoded.data
    if data[:8] == _PNG and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    if data[:2] == _JPG:
        return _jpg_shape(data)
    raise ValueError("neither a jpg nor a png file")


def _jpg_shape(data: memoryview) -> tuple[int, int]:
    position = 2
    while position + 9 <= len(data):
        # Like libjpeg: bytes before a marker are skipped, and a marker may be preceded by fill bytes 0xFF.
        if data[position] != 0xFF or data[position + 1] in (0x00, 0xFF):
            position += 1
            continue
        marker = data[position + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return height, width
        if marker in _STANDALONE:
            position += 2
            continue
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    raise ValueError("a jpg file without a frame header")


def decode_one(encoded: NDArray[np.uint8], *, size: int, channels: int) -> Tensor:
    """One encoded image to uint8 `[channels, size, size]`: shorter side resized, centre crop.

    EXIF rotation is not applied. Raises ValueError or RuntimeError for bytes that are not a whole jpg or png
    of at most `PIXEL_LIMIT` pixels.
    """
    height, width = image_shape(encoded)
    if not 0 < height * width <= PIXEL_LIMIT:
        raise ValueError(f"{height} x {width} pixels, allowed 1 to {PIXEL_LIMIT}")
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    image_CHW = decode_image(torch.from_numpy(encoded), mode=mode)
    if image_CHW.dtype != torch.uint8:
        raise ValueError(f"{image_CHW.dtype} pixels, allowed 8 bits a channel")
    return convert_images(image_CHW[None], size=size, channels=channels)[0]


def decode_many(
    count: int,
    read: Callable[[int], NDArray[np.uint8]],
    name: Callable[[int], str],
    *,
    size: int,
    channels: int,
) -> Tensor:
    """`count` encoded images to uint8 `[count, channels, size, size]`, in as many threads as torch has.

    `read(i)` gives the bytes of image i and `name(i)` what to call it in an error. Raises DatasetError.
    """
    out = torch.empty(count, channels, size, size, dtype=torch.uint8)

    def fill(i: int) -> None:
        try:
            out[i] = decode_one(read(i), size=size, channels=channels)
        except (ValueError, RuntimeError, OSError) as error:
            raise DatasetError(f"{name(i)}: not a readable image: {error}") from error

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        for i in range(count):
            fill(i)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, range(count)):
                pass
    return out
