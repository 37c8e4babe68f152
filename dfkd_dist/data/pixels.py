"""Pixel conversions: uint8 to image space and back, grey to RGB and back, any size to a square."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 4096
"""Images converted at a time: bounds the temporaries, which are four times the size of the uint8 input."""


def to_image_space(images_uint8: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images of any shape to `dtype` in [0, 1] (divided by 255)."""
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"to_image_space: expected uint8 images, found {images_uint8.dtype}")
    return images_uint8.to(dtype) / 255


def to_uint8(images_NCHW: Tensor) -> Tensor:
    """Float images in image space to uint8, clamped to [0, 1] and rounded to the nearest of the 256 levels.

    Undoes `to_image_space` exactly for float32 and float64; bfloat16 and float16 may be off by one level.
    NaNs have no meaningful result.
    """
    if not images_NCHW.is_floating_point():
        raise ValueError(f"to_uint8: expected floating point images, found {images_NCHW.dtype}")
    wide = images_NCHW if images_NCHW.dtype == torch.float64 else images_NCHW.float()
    return wide.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_grey(images_NCHW: Tensor) -> Tensor:
    """uint8 RGB `[N, 3, H, W]` to grey `[N, 1, H, W]`: ITU-R BT.601 luma, rounded (integer arithmetic)."""
    red, green, blue = images_NCHW.to(torch.int32).unbind(1)
    luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
    return luma.to(torch.uint8).unsqueeze(1)


def to_square(images_NCHW: Tensor, size: int) -> Tensor:
    """Resize the shorter side (uint8, bilinear, antialiased), then centre crop to `[N, C, size, size]`."""
    sides, rows, columns = square(images_NCHW.shape[-2], images_NCHW.shape[-1], size)
    if sides != tuple(images_NCHW.shape[-2:]):
        images_NCHW = F.interpolate(images_NCHW, size=sides, mode="bilinear", antialias=True)
    return images_NCHW[..., rows, columns]


def square(height: int, width: int, size: int) -> tuple[tuple[int, int], slice, slice]:
    """How an image becomes a square: height and width after its shorter side was resized, rows and columns kept."""
    scale = size / min(height, width)
    # The shorter side is `size` by definition; rounding must not make it anything else.
    new_height = size if height <= width else max(size, round(height * scale))
    new_width = size if width <= height else max(size, round(width * scale))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return (new_height, new_width), slice(top, top + size), slice(left, left + size)


def convert_images(images_NCHW: Tensor, *, size: int, channels: int) -> Tensor:
    """uint8 `[N, 1 or 3, H, W]` to uint8 `[N, channels, size, size]`, in chunks so that memory stays bounded.

    Raises ValueError for another dtype, shape or number of channels.
    """
    if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] not in (1, 3):
        found = f"{images_NCHW.dtype} {tuple(images_NCHW.shape)}"
        raise ValueError(f"convert_images: expected uint8 images [N, 1 or 3, H, W], found {found}")
    if channels not in (1, 3):
        raise ValueError(f"convert_images: channels must be 1 or 3, found {channels}")
    if images_NCHW.shape[1:] == (channels, size, size):
        return images_NCHW.contiguous()
    out = torch.empty(len(images_NCHW), channels, size, size, dtype=torch.uint8)
    for start in range(0, len(out), CHUNK):
        chunk = images_NCHW[start : start + CHUNK]
        if channels < chunk.shape[1]:
            chunk = to_grey(chunk)
        # Assignment repeats a grey channel three times, after the resize rather than before it.
        out[start : start + CHUNK] = to_square(chunk, size)
    return out
