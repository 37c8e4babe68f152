"""What an encoded image says about itself, looked at before anything is decoded.

Jpgs, the common case, are looked at many at a time: one step of a loop takes all of them one segment further. Whatever
is unusual (fill bytes, many segments, other formats) is looked at one by one.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.decode import image_format, image_shape
from dfkd_dist.data.stream.batch import Unusable

PADDING = 16
"""Bytes behind the last image that may be looked at, so that no index needs checking."""

_OTHER, _SEGMENT, _FRAME = 0, 1, 2
_FRAME_BYTES = 10
_STEPS = 40
"""Segments in front of the frame header; files with more are looked at one by one."""


def _marker_kinds() -> NDArray[np.uint8]:
    """What follows `FF xx` in a jpg: a segment with a length, a frame header, or something that needs a closer look."""
    kinds = np.full(256, _OTHER, dtype=np.uint8)
    kinds[0xC0:0xD0] = _FRAME
    kinds[[0xC4, 0xCC]] = _SEGMENT  # tables; C8 is reserved
    kinds[0xC8] = _OTHER
    kinds[0xDB:0xFF] = _SEGMENT  # tables, restart interval, application data, comments
    return kinds


_KINDS = _marker_kinds()


def plain_jpg_shapes(
    data: NDArray[np.uint8], starts_N: NDArray[np.int64], stops_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths of the grey and YCbCr jpgs among files that lie in `data`; 0 where `checked_shape` must look.

    Args:
        data: uint8, with at least `PADDING` bytes behind the last file.
        starts_N: where each begins.
        stops_N: where each ends.
    """
    heights_N = np.zeros(len(starts_N), dtype=np.int64)
    widths_N = np.zeros(len(starts_N), dtype=np.int64)
    last = len(data) - PADDING
    file_n = np.flatnonzero((data[starts_N] == 0xFF) & (data[starts_N + 1] == 0xD8))
    at_n = starts_N[file_n] + 2
    for _ in range(_STEPS):
        if not len(file_n):
            break
        kind_n = np.where(data[at_n] == 0xFF, _KINDS[data[at_n + 1]], _OTHER)
        length_n = data[at_n + 2].astype(np.int64) << 8 | data[at_n + 3]
        if not (kind_n == _SEGMENT).all():
            found = np.flatnonzero(kind_n == _FRAME)
            _take_frames(data, file_n[found], at_n[found], stops_N, heights_N, widths_N)
            going_on = kind_n == _SEGMENT
            file_n, at_n, length_n = file_n[going_on], at_n[going_on], length_n[going_on]
        at_n = np.minimum(at_n + 2 + length_n, last)
    return heights_N, widths_N


def _take_frames(
    data: NDArray[np.uint8],
    file_n: NDArray[np.int64],
    at_n: NDArray[np.int64],
    stops_N: NDArray[np.int64],
    heights_N: NDArray[np.int64],
    widths_N: NDArray[np.int64],
) -> None:
    """FF Cx, length, precision, height, width, components: those that are plain and within their file."""
    components_n = data[at_n + 9]
    plain = (data[at_n + 4] == 8) & ((components_n == 1) | (components_n == 3))
    plain &= at_n + _FRAME_BYTES <= stops_N[file_n]
    file_n, at_n = file_n[plain], at_n[plain]
    heights_N[file_n] = data[at_n + 5].astype(np.int64) << 8 | data[at_n + 6]
    widths_N[file_n] = data[at_n + 7].astype(np.int64) << 8 | data[at_n + 8]


def checked_shape(encoded: NDArray[np.uint8]) -> tuple[str, int, int]:
    """Format ("jpg", "png" or "webp"), height and width of one file.

    Raises:
        Unusable: not_an_image, gif, animated, cmyk, or corrupt where the header is.
    """
    data = encoded.data
    if data[:4].tobytes() == b"GIF8":
        raise Unusable("gif", "a gif file")
    try:
        kind = image_format(data)
    except ValueError as error:
        raise Unusable("not_an_image", f"{error}; it begins with {bytes(data[:8])!r}") from error
    try:
        height, width = image_shape(encoded)
        inks = _jpg_components(data) if kind == "jpg" else 0
    except (ValueError, struct.error, IndexError) as error:
        raise Unusable("corrupt", str(error)) from error
    if inks == 4:
        raise Unusable("cmyk", "a jpg with 4 components")
    if _is_apng(data) if kind == "png" else kind == "webp" and _is_animated_webp(data):
        raise Unusable("animated", f"a {kind} file with several frames")
    return kind, height, width


def _jpg_components(data: memoryview) -> int:
    """Number of components in the frame header; like libjpeg, bytes in front of a marker are skipped."""
    at = 2
    while at + _FRAME_BYTES <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):
            at += 1
            continue
        marker = data[at + 1]
        if _KINDS[marker] == _FRAME:
            return data[at + 9]
        standalone = marker == 0x01 or 0xD0 <= marker <= 0xD7
        at += 2 if standalone else 2 + (data[at + 2] << 8 | data[at + 3])
    raise ValueError("a jpg file without a frame header")


def _is_animated_webp(data: memoryview) -> bool:
    """An extended file has flags."""
    return data[12:16].tobytes() == b"VP8X" and bool(data[20] & 0x02)


def _is_apng(data: memoryview) -> bool:
    """An animation says so in a chunk `acTL` in front of the image's data."""
    at = 8
    while at + 12 <= len(data):
        name = bytes(data[at + 4 : at + 8])
        if name in (b"acTL", b"IDAT"):
            return name == b"acTL"
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False
