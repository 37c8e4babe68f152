"""Inputs that are tars already: foreign ones are searched for images, a set of shards brings its own index."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import expand, is_remote, local_copy, read_range
from dfkd_dist.data.shards.index import Indexed, index_tar
from dfkd_dist.data.shards.inputs import Input, file_identity, numbered_labels
from dfkd_dist.data.shards.manifest import read_manifest


class _InTars(Input):
    """Images at known places in tars; each is read by itself, so that any process may read any of them."""

    def __init__(
        self,
        locations: Sequence[str],
        starts: NDArray[np.int64],
        offsets_N: NDArray[np.int64],
        sizes_N: NDArray[np.int64],
        keys: list[str],
        labels_N: NDArray[np.int64] | None,
        classes: Sequence[str] | None,
    ) -> None:
        self.locations = list(locations)
        self._starts, self._offsets_N, self._sizes_N, self._keys = starts, offsets_N, sizes_N, keys
        super().__init__(len(keys), labels_N, classes)

    def key(self, i: int) -> str:
        """As in the tar."""
        return self._keys[i]

    def read(self, i: int) -> bytes:
        """The encoded file."""
        size = int(self._sizes_N[i])
        data = read_range(self._location(i), int(self._offsets_N[i]), size)
        if len(data) != size:
            raise DatasetError(f"{self.where(i)}: expected {size} bytes, found {len(data)}; the tar was cut")
        return data

    def where(self, i: int) -> str:
        """The tar, and the sample's name."""
        return f"{self._location(i)}: {self._keys[i]}"

    def lies_in(self, folder: Path) -> bool:
        """Whether one of the tars is in that folder."""
        return any(not is_remote(name) and Path(name).resolve().parent == folder.resolve() for name in self.locations)

    def _location(self, i: int) -> str:
        return self.locations[int(np.searchsorted(self._starts, i, side="right")) - 1]


class TarInput(_InTars):
    """Foreign tars, by folder, glob pattern, braces or URL; labels are members `KEY.cls` (numbers or names)."""

    kind = "tar"

    def __init__(self, where: str, classes: Sequence[str] | None = None) -> None:
        """Search each tar for images (remote ones travel once for that); DatasetError names the tar."""
        self._where = where
        locations = expand(where)
        found: list[list[Indexed]] = []
        for location in locations:
            with local_copy(location) as path:
                found.append(index_tar(path, location))
        samples = list(chain.from_iterable(found))
        labels_N, names = numbered_labels([sample.label for sample in samples], classes, where)
        super().__init__(
            locations,
            np.cumsum([0, *map(len, found)])[:-1],
            np.array([sample.offset for sample in samples], dtype=np.int64),
            np.array([sample.size for sample in samples], dtype=np.int64),
            [sample.key for sample in samples],
            labels_N,
            names,
        )

    def described(self) -> str:
        """As it was given."""
        return self._where

    def identity(self) -> dict[str, Any]:
        """Places, sizes and times of change; of remote tars the names only."""
        return {"kind": self.kind, "tars": tars_identity(self.locations)}


class SetInput(_InTars):
    """A set of shards with its manifest."""

    kind = "shards"

    def __init__(self, where: str) -> None:
        """Read the manifest; raises DatasetError."""
        manifest = read_manifest(where)
        self._path, self._digest = manifest.path, manifest.digest
        super().__init__(
            [manifest.location(shard) for shard in range(len(manifest.shards))],
            manifest.starts()[:-1],
            manifest.offsets_N,
            manifest.sizes_N,
            list(chain.from_iterable(manifest.all_keys())),
            manifest.labels_N,
            manifest.classes,
        )

    def described(self) -> str:
        """The manifest."""
        return self._path

    def identity(self) -> dict[str, Any]:
        """The manifest's check sum covers those of its shards."""
        return {"kind": self.kind, "sha256": self._digest}


def tars_identity(locations: Sequence[str]) -> list[Any]:
    """For a resumed build to compare: remote tars by name, local ones also by size and time of change."""
    return [
        location if is_remote(location) or not Path(location).is_file() else file_identity(location)
        for location in locations
    ]
