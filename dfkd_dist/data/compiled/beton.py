"""What a compiled file holds besides pixels, read without FFCV, whose import takes many seconds.

The layout is that of FFCV's format 2 for our three fields: a header, the fields' descriptions, for each sample where
its image lies, its label and its id; images in pages; a table of what lies where.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError

FIELDS = ("image", "label", "id")
_VERSION = 2
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("kind", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8"), ("id", "<i8")], align=True)
"""One sample's entry."""
_PIECE = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])


class Beton(NamedTuple):
    """The numbers of n samples, in the order of the file."""

    ids_n: NDArray[np.int64]
    labels_n: NDArray[np.int64]
    sizes_n: NDArray[np.int64]
    """Bytes of each image as it is stored."""


def read_beton(path: Path) -> Beton:
    """Everything but the pixels.

    Raises:
        DatasetError: no such file, or not one that `dfkd shards compile` wrote; says what was found.
    """
    try:
        return _read(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: Path) -> Beton:
    header = np.fromfile(path, _HEADER, count=1)
    if len(header) != 1 or int(header["version"][0]) != _VERSION:
        found = "it is cut" if len(header) != 1 else f"version {int(header['version'][0])}"
        raise DatasetError(f"{path}: not an FFCV file of format {_VERSION}: {found}")
    number, count = int(header["fields"][0]), int(header["samples"][0])
    fields = np.fromfile(path, _FIELD, count=min(number, 256), offset=_HEADER.itemsize)
    names = tuple(row.tobytes().rstrip(b"\0").decode("ascii", "replace") for row in fields["name"])
    if names != FIELDS:
        raise DatasetError(f"{path}: its fields are {names}; expected {FIELDS}, as `dfkd shards compile` writes them")
    samples = np.fromfile(path, SAMPLE, count=count, offset=_HEADER.itemsize + fields.nbytes)
    pieces = np.fromfile(path, _PIECE, offset=int(header["table"][0]))
    pieces = pieces[np.argsort(pieces["sample"], kind="stable")]
    if len(samples) != count or not np.array_equal(pieces["sample"], np.arange(count)):
        raise DatasetError(f"{path}: says {count} samples, but holds {len(samples)} and the places of {len(pieces)}")
    return Beton(samples["id"].astype(np.int64), samples["label"].astype(np.int64), pieces["size"].astype(np.int64))
