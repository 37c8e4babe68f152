"""From what an input gives to what goes into the tar: original bytes where possible, else jpg or png."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, encode_png

from dfkd_dist.data.decode import PIXEL_LIMIT, image_format, image_shape
from dfkd_dist.data.pixels import to_square

Format = Literal["auto", "jpg", "png"]
_PNG_DEPTH = 24
"""Where a png says how many bits a channel has."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    Args:
        size: side of the square that every image becomes (shorter side resized with antialiasing, centre crop); smaller
            images are enlarged. None leaves images as large as they are.
        format: `auto` keeps encoded files that need no resizing byte for byte, stores pixels without a file as png, and
            resized files as jpg. `jpg` and `png` encode everything anew that is not already of that format and size.
        quality: of jpg, 1 .. 100.
    """

    size: int | None = None
    format: Format = "auto"
    quality: int = 95

    def __post_init__(self) -> None:
        """ValueError names the option that is out of range."""
        if self.size is not None and not 1 <= self.size <= 8192:
            raise ValueError(f"size: found {self.size}, allowed are 1 .. 8192")
        if self.format not in ("auto", "jpg", "png"):
            raise ValueError(f"format: found {self.format!r}, allowed are auto, jpg, png")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: found {self.quality}, allowed are 1 .. 100")


def encode(image: bytes | Tensor, how: Encoding) -> tuple[str, bytes]:
    """An encoded file or uint8 `[1 or 3, H, W]` to (suffix, bytes) as they are stored.

    Raises ValueError or RuntimeError for bytes that are no jpg, png or webp of an allowed size, or, where they must
    be decoded, not a whole one. Files that are kept are not decoded: only their headers are read.
    """
    if isinstance(image, Tensor):
        stored = "png" if how.format == "auto" else how.format
        return stored, _encoded(_resized(image, how.size), stored, how.quality)
    suffix = image_format(image)
    fits = how.size is None or checked_shape(image) == (how.size, how.size)
    if fits and how.format in ("auto", suffix):
        checked_shape(image)
        return suffix, image
    wanted = "jpg" if how.format == "auto" else how.format
    return wanted, _encoded(_resized(decode_native(image), how.size), wanted, how.quality)


def checked_shape(data: bytes) -> tuple[int, int]:
    """(height, width) from the header; ValueError for no image, none or more than `PIXEL_LIMIT` pixels, or 16 bits."""
    height, width = image_shape(np.frombuffer(data, dtype=np.uint8))
    if not 0 < height * width <= PIXEL_LIMIT:
        raise ValueError(f"{height} x {width} pixels, allowed 1 to {PIXEL_LIMIT}")
    if image_format(data) == "png" and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10":
        raise ValueError("16 bits a channel, allowed are 8")
    return height, width


def decode_native(data: bytes) -> Tensor:
    """An encoded file to uint8 `[1 or 3, H, W]`: grey stays grey, anything else becomes RGB (transparency is dropped).

    Raises ValueError or RuntimeError for bytes that are not a whole image of at most `PIXEL_LIMIT` pixels.
    """
    checked_shape(data)
    # A bytearray, because torch has no tensors that cannot be written to.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image_CHW = decode_image(encoded, mode=ImageReadMode.UNCHANGED)
    if len(image_CHW) == 4:
        return decode_image(encoded, mode=ImageReadMode.RGB)
    return image_CHW[:1] if len(image_CHW) == 2 else image_CHW


def _resized(image_CHW: Tensor, size: int | None) -> Tensor:
    if size is None or image_CHW.shape[1:] == (size, size):
        return image_CHW
    return to_square(image_CHW[None], size)[0]


def _encoded(image_CHW: Tensor, suffix: str, quality: int) -> bytes:
    image_CHW = image_CHW.contiguous()
    data = encode_png(image_CHW) if suffix == "png" else encode_jpeg(image_CHW, quality=quality)
    return data.numpy().tobytes()
