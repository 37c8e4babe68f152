"""Shards of the chosen samples alone: their files byte for byte, with pseudo-labels as labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.selection import Selection
from dfkd_dist.data.shards.build import BuildOptions, build
from dfkd_dist.data.shards.files import is_remote, read_range
from dfkd_dist.data.shards.inputs import Input
from dfkd_dist.data.shards.manifest import Manifest


class SelectedInput(Input):
    """The chosen samples of a set in its order; a sample is called by its id in the whole set.

    Args:
        manifest: the set.
        selection: with labels.
        classes: names of the labels, or None.

    Raises:
        DatasetError: nothing is chosen.
    """

    kind = "selection"

    def __init__(self, manifest: Manifest, selection: Selection, classes: Sequence[str] | None) -> None:
        self._manifest, self._digest = manifest, _digest(selection)
        self._ids = np.flatnonzero(selection.chosen_N)
        self._locations = [manifest.location(shard) for shard in range(len(manifest.shards))]
        self._shards = manifest.where(self._ids)[0]
        labels_N = None if selection.labels_N is None else selection.labels_N[self._ids].astype(np.int64)
        super().__init__(len(self._ids), labels_N, classes)

    def key(self, i: int) -> str:
        """The sample's place in the set it comes from."""
        return f"{self._ids[i]:09d}"

    def read(self, i: int) -> bytes:
        """The encoded file."""
        location, offset, size = self._place(i)
        data = read_range(location, offset, size)
        if len(data) != size:
            raise DatasetError(f"{self.where(i)}: expected {size} bytes, found {len(data)}; the tar was cut")
        return data

    def described(self) -> str:
        """The set, and that it is not all of it."""
        return f"the selection of {self._manifest.path}"

    def where(self, i: int) -> str:
        """The tar, and where in it."""
        location, offset, _ = self._place(i)
        return f"{location}: offset {offset} (sample {self._ids[i]})"

    def lies_in(self, folder: Path) -> bool:
        """Whether the set's own shards are in that folder."""
        local = (Path(name) for name in self._locations if not is_remote(name))
        return any(path.resolve().parent == folder.resolve() for path in local)

    def identity(self) -> dict[str, Any]:
        """Which set, and which of its samples with which labels."""
        return {"kind": self.kind, "manifest": self._manifest.digest, "chosen": self._digest}

    def _place(self, i: int) -> tuple[str, int, int]:
        sample = int(self._ids[i])
        location = self._locations[int(self._shards[i])]
        return location, int(self._manifest.offsets_N[sample]), int(self._manifest.sizes_N[sample])


def compact(
    manifest: Manifest,
    selection: Selection,
    folder: Path,
    classes: Sequence[str] | None = None,
    *,
    options: BuildOptions | None = None,
    workers: int = 1,
) -> Manifest:
    """Write the chosen samples as a set of shards of its own; an interrupted call goes on where it was.

    Args:
        manifest: the set that they come from.
        selection: read with labels, which become the new set's labels.
        folder: where to; empty, or an earlier call's.
        classes: names of the labels, or None for numbers.
        options: of the shards.
        workers: processes.

    Raises:
        DatasetError: nothing is chosen, a shard cannot be read, or the folder holds something else.
    """
    return build(SelectedInput(manifest, selection, classes), folder, options or BuildOptions(), workers=workers)


def _digest(selection: Selection) -> str:
    digest = hashlib.sha256(np.packbits(selection.chosen_N).tobytes())
    if selection.labels_N is not None:
        digest.update(selection.labels_N.tobytes())
    return digest.hexdigest()
