"""Which set a recipe's reader names, and which of its samples take part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled.about import SUFFIX, read_compiled
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.order import subset


def open_set(reader: ReaderSpec) -> Manifest:
    """The samples of a set of shards, or of a compiled file under the ids that they have in their set.

    Raises:
        DatasetError: it cannot be read, or is not of `reader.kind`.
    """
    if reader.kind == "ffcv":
        return read_compiled(reader.shards).manifest
    if reader.shards.endswith(SUFFIX):
        raise DatasetError(f"{reader.shards}: a compiled file is read by reader.kind: ffcv, found {reader.kind!r}")
    return read_manifest(reader.shards)


def taking_part(manifest: Manifest, fraction: float, seed: int) -> NDArray[np.bool_] | None:
    """`[N]` which samples a stream can use: those that are there, of `reader.fraction`; None for all."""
    part_N = None if fraction >= 1 else subset(len(manifest), fraction, seed)
    if part_N is None or manifest.held_N is None:
        return manifest.held_N if part_N is None else part_N
    return part_N & manifest.held_N
