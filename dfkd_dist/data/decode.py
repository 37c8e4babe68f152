"""Encoded jpg, png and webp bytes to uint8 tensors, with a pixel limit that is checked before decoding."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pixels import convert_images

PIXEL_LIMIT = 2**26
"""Largest height x width that is decoded (8192 x 8192): a small file may claim any size."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPG = b"\xff\xd8"
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_START_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_format(data: memoryview | bytes) -> str:
    """What a file's first bytes say it is: "jpg", "png" or "webp"; ValueError if it is none of them."""
    if data[:8] == _PNG:
        return "png"
    if data[:2] == _JPG:
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ValueError("neither a jpg nor a png nor a webp file")


def image_shape(encoded: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) as a jpg, png or webp file states them; ValueError if it is none or has no header."""
    data = encoded.data
    kind = image_format(data)
    if kind == "jpg":
        return _jpg_shape(data)
    if kind == "webp":
        return _webp_shape(data)
    if len(data) < 24:
        raise ValueError("a png file without a header")
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _webp_shape(data: memoryview) -> tuple[int, int]:
    """The first chunk is a lossy frame, a lossless one, or the canvas of an extended file."""
    if len(data) < 30:
        raise ValueError("a webp file without a header")
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    raise ValueError(f"a webp file that begins with a chunk {kind!r}")


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

    EXIF rotation is not applied. Raises ValueError or RuntimeError for bytes that are not a whole jpg, png or webp
    of at most `PIXEL_LIMIT` pixels.
    """
    # Here, because a stream's reading processes use this file's headers and start twice as fast without torchvision.
    from torchvision.io import ImageReadMode, decode_image

    height, width = image_shape(encoded)
    if not 0 < height * width <= PIXEL_LIMIT:
        raise ValueError(f"{height} x {width} pixels, allowed 1 to {PIXEL_LIMIT}")
    # The webp decoder makes no grey images; convert_images does.
    grey = channels == 1 and image_format(encoded.data) != "webp"
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
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
