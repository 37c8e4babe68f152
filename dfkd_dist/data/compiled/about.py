"""A compiled file and the small JSON beside it, which says what was compiled: `set.beton` and `set.beton.json`.

    {"format": "dfkd-compiled/1", "source": "sets/photos/manifest.json", "set": "<digest>", "selection": null,
     "samples": 1500, "count": 1498, "size": 32, "channels": 3, "mode": "raw", "split": null, "ids": "int64",
     "bytes": 16777216, "sha256": "...", "classes": ["cat", "dog"], "shards": [["000000.tar", 1000], ...],
     "bad": [{"id": 3, "label": 0, "cause": "corrupt", "detail": "..."}, ...]}

Ids stay those of the set: so the order of an epoch, fractions and selections are what they are when the tars are read.
A sample that could not be decoded is not in the file but in this list, and keeps its slot, masked, as it would there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.compiled.beton import Beton, read_beton
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import is_remote
from dfkd_dist.data.shards.manifest import NO_LABEL, Manifest, Shard

FORMAT = "dfkd-compiled/1"
SUFFIX = ".beton"
IDS = "int64"


@dataclass(frozen=True)
class LeftOut:
    """A sample that could not be decoded."""

    id: int
    label: int
    cause: str
    """A key of `stream.batch.CAUSES`."""
    detail: str


@dataclass(frozen=True)
class About:
    """What the JSON says.

    Args:
        source: where the images came from, for people.
        set: digest of the shards' manifest; None for an image set.
        selection: sha256 of the mask of the samples that were asked for; None for all.
        samples: of the whole set.
        count: in the file.
        size: side of the images in pixels.
        channels: 1 or 3. Grey images are stored as three equal channels: FFCV knows no others.
        mode: raw, jpg or proportion.
        split: of an image set, else None.
        bytes: size of the file.
        sha256: of the file.
        classes: names of the labels, or None.
        shards: names and counts of the set's shards.
        bad: samples that could not be decoded, in the order of ids.
    """

    source: str
    set: str | None
    selection: str | None
    samples: int
    count: int
    size: int
    channels: int
    mode: str
    split: str | None
    bytes: int
    sha256: str
    classes: list[str] | None
    shards: list[tuple[str, int]]
    bad: list[LeftOut]

    def text(self) -> str:
        """The JSON."""
        return json.dumps({"format": FORMAT, "ids": IDS, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class Compiled:
    """A compiled file: what it is, and the numbers of its samples as those of the set that it came from.

    `manifest.offsets_N` are places in the file: 0, 1, ...; -1 - k for sample k of `about.bad`, and below that for
    samples that were never asked for.
    """

    path: Path
    about: About
    manifest: Manifest

    def held(self) -> NDArray[np.int64]:
        """int64, rising: ids of the images in the file."""
        return np.flatnonzero(self.manifest.offsets_N >= 0)

    def check(self, size: int, channels: int) -> None:
        """Raises DatasetError where images of another size or number of channels are wanted."""
        about = self.about
        if (size, channels) != (about.size, about.channels):
            raise DatasetError(
                f"{self.path}: holds images of {about.size} px with {about.channels} channel(s), asked for are {size} "
                f"px with {channels}; compile it anew with --size {size} --channels {channels}"
            )


def about_path(path: Path) -> Path:
    """Where the JSON lies."""
    return path.with_name(path.name + ".json")


def read_compiled(where: str | Path) -> Compiled:
    """Open a compiled file; no pixel is read, and FFCV is not needed.

    Raises:
        DatasetError: it or its JSON is missing, damaged, of another format, or they do not belong together.
    """
    if is_remote(str(where)):
        raise DatasetError(f"{where}: a compiled file is mapped into memory; allowed: a path on this machine")
    path = Path(where)
    if not path.is_file() or path.suffix != SUFFIX:
        raise DatasetError(f"{path}: no such file; allowed for ffcv: a {SUFFIX} that `dfkd shards compile` wrote")
    try:
        content = about_path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"{about_path(path)}: cannot be read ({error.strerror}); it says what {path} is") from error
    about = _parsed(about_path(path), content)
    if path.stat().st_size != about.bytes:
        found = f"{path.stat().st_size} bytes, but its JSON says {about.bytes}"
        raise DatasetError(f"{path}: has {found}; it was cut or replaced, so compile it anew")
    return Compiled(path, about, _manifest(path, about, hashlib.sha256(content).hexdigest(), read_beton(path)))


def _parsed(path: Path, content: bytes) -> About:
    try:
        tree: dict[str, Any] = json.loads(content)
        found, ids = tree.pop("format"), tree.pop("ids")
        if found != FORMAT or ids != IDS:
            raise DatasetError(f"{path}: format is {found!r} with ids {ids!r}; allowed: {FORMAT!r} with {IDS!r}")
        bad = [LeftOut(**entry) for entry in tree.pop("bad")]
        return About(**tree | {"bad": bad, "shards": [(str(name), int(count)) for name, count in tree["shards"]]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: not the description of a compiled file: {error!r}") from error


def _manifest(path: Path, about: About, digest: str, beton: Beton) -> Manifest:
    counts = [count for _, count in about.shards]
    starts = np.cumsum([0, *counts])
    bad_ids = np.array([sample.id for sample in about.bad], dtype=np.int64)
    ids = np.concatenate([beton.ids_n, bad_ids])
    whole = starts[-1] == about.samples and len(beton.ids_n) == about.count
    if not whole or (np.diff(beton.ids_n) <= 0).any() or len(np.unique(ids)) != len(ids):
        raise DatasetError(f"{path}: contradicts its JSON, so one of them was replaced; compile it anew")
    if len(ids) and not 0 <= ids.min() <= ids.max() < about.samples:
        raise DatasetError(f"{path}: holds ids {ids.min()} to {ids.max()}; allowed are 0 to {about.samples - 1}")
    offsets_N = np.full(about.samples, -1 - len(bad_ids), dtype=np.int64)
    offsets_N[bad_ids] = -1 - np.arange(len(bad_ids))
    offsets_N[beton.ids_n] = np.arange(about.count)
    sizes_N, labels_N = np.zeros(about.samples, np.int64), np.full(about.samples, NO_LABEL, np.int64)
    sizes_N[beton.ids_n] = beton.sizes_n
    labels_N[beton.ids_n] = beton.labels_n
    labels_N[bad_ids] = [sample.label for sample in about.bad]
    held_N = np.zeros(about.samples, bool)
    held_N[ids] = True
    shards = tuple(
        Shard(name, count, 0, "", int(start)) for (name, count), start in zip(about.shards, starts, strict=False)
    )
    classes = None if about.classes is None else tuple(about.classes)
    held = None if held_N.all() else held_N
    return Manifest(str(path), digest, shards, classes, offsets_N, sizes_N, labels_N, held, about.set)
