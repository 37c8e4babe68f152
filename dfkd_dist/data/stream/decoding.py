"""Encoded images that lie in one buffer to uint8 tensors of one size; what cannot be decoded is named, not raised."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.pixels import to_grey, to_square
from dfkd_dist.data.stream.batch import Failure, Unusable
from dfkd_dist.data.stream.headers import checked_shape, plain_jpg_shapes

_GRAY, _RGB = 1, 3
_TOGETHER = 256 * 256
"""Images of up to so many pixels are resized together with others of their shape; larger ones at once and alone."""


def register_decoders() -> None:
    """Make `torch.ops.image` known from torchvision's library alone: all of it takes as long to import as torch."""
    if hasattr(torch.ops.image, "decode_jpeg"):
        return
    found = importlib.util.find_spec("torchvision")
    places = [] if found is None else found.submodule_search_locations or []
    library = next((path for place in places for path in Path(place).glob("image*.so")), None)
    try:
        if library is None:
            raise OSError("torchvision has no image library where it used to be")
        torch.ops.load_library(str(library))
    except OSError:
        import torchvision.io  # noqa: F401  (whatever it takes: this one says what is wrong)


register_decoders()


class Decoder:
    """Decodes to `[channels, size, size]`: the shorter side resized, centre crop, as in `data.pixels`.

    torchvision's operators are called without the Python functions around them, which take 2 of the 17 microseconds
    that a 32 px jpg takes. 16-bit png files are rounded to 8 bits; EXIF rotation is not applied.

    Args:
        size: side in pixels.
        channels: 1 or 3.
        pixel_limit: largest height x width that is decoded.
    """

    def __init__(self, size: int, channels: int, pixel_limit: int) -> None:
        self.size, self.channels, self.pixel_limit = size, channels, pixel_limit
        self._blank = torch.zeros(channels, size, size, dtype=torch.uint8)

    def decode(
        self,
        data: NDArray[np.uint8],
        starts_n: NDArray[np.int64],
        stops_n: NDArray[np.int64],
        positions_n: NDArray[np.int64],
        images: list[Tensor],
        failures: list[Failure],
    ) -> None:
        """Put the files at `data[starts:stops]` (and `PADDING` bytes behind) into `images` at `positions`.

        Where one cannot be decoded a failure is added, and the list keeps what it had.
        """
        heights_n, widths_n = plain_jpg_shapes(data, starts_n, stops_n)
        whole = torch.from_numpy(data)
        mode, size, limit = _GRAY if self.channels == 1 else _RGB, self.size, self.pixel_limit
        decode_jpg = torch.ops.image.decode_jpeg.default
        others: dict[tuple[int, int], list[int]] = {}
        numbers = (starts_n.tolist(), stops_n.tolist(), heights_n.tolist(), widths_n.tolist(), positions_n.tolist())
        for start, stop, height, width, position in zip(*numbers, strict=True):
            try:
                if 0 < height * width <= limit:
                    images[position] = decode_jpg(whole[start:stop], mode, False)
                else:
                    images[position], height, width = self._closely(data[start:stop])
            except RuntimeError as error:
                failures.append(Failure(position, "corrupt", _first_line(error)))
                continue
            except Unusable as error:
                failures.append(Failure(position, error.cause, error.detail))
                continue
            if height != size or width != size:
                if height * width <= _TOGETHER:
                    others.setdefault((height, width), []).append(position)
                else:
                    images[position] = to_square(images[position][None], size)[0]
        for positions in others.values():
            squares_nCSS = to_square(torch.stack([images[position] for position in positions]), size)
            for position, image_CSS in zip(positions, squares_nCSS.unbind(), strict=True):
                images[position] = image_CSS

    def blanks(self, count: int) -> list[Tensor]:
        """What `decode` fills: images that stay zero where nothing can be decoded."""
        return [self._blank] * count

    def join(self, images: list[Tensor], out_NCHW: Tensor | None) -> Tensor:
        """Images of the right size to `[n, C, S, S]`, channels last in memory: decoders write them so.

        All at once: image by image, while others are decoded, it takes twice as long.
        """
        if out_NCHW is None:
            shape = (len(images), self.channels, self.size, self.size)
            out_NCHW = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        return torch.stack(images, out=out_NCHW) if images else out_NCHW

    def _closely(self, encoded: NDArray[np.uint8]) -> tuple[Tensor, int, int]:
        """One file that is not a plain jpg; Unusable or RuntimeError."""
        kind, height, width = checked_shape(encoded)
        if not 0 < height * width <= self.pixel_limit:
            detail = f"{height} x {width} pixels, allowed 1 to {self.pixel_limit}"
            raise Unusable("too_many_pixels" if height * width else "corrupt", detail)
        data = torch.from_numpy(encoded)
        mode = _GRAY if self.channels == 1 else _RGB
        if kind == "jpg":
            image_CHW = torch.ops.image.decode_jpeg.default(data, mode, False)
        elif kind == "png":
            image_CHW = torch.ops.image.decode_png.default(data, mode, False)
        else:
            image_CHW = torch.ops.image.decode_webp.default(data, _RGB)
        if image_CHW.dtype == torch.uint16:
            image_CHW = ((image_CHW.to(torch.int32) + 128) // 257).to(torch.uint8)
        if image_CHW.shape[0] > self.channels:
            image_CHW = to_grey(image_CHW[None])[0]
        return image_CHW, height, width


def _first_line(error: RuntimeError) -> str:
    """The decoder's own words, without the place in its source that they begin with."""
    return re.sub(r"^\S+, \S+:\d+, ", "", str(error).partition("\n")[0])
