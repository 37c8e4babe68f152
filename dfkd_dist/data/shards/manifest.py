"""`manifest.json`: what a set of shards holds and where each image lies in its tar.

The file is ordinary JSON, but with one shard to a line, so that a set of any size is read line by line in the memory of
one shard (its numbers go to arrays at once).

    {"format": "dfkd-shards/1", "classes": ["cat", "dog"], "count": 1500, "shards": [
    {"name": "000000.tar", "count": 1000, "bytes": 2097152, "sha256": "...",
     "keys": [...], "members": ["jpg", ...], "offsets": [...], "sizes": [...], "labels": [...], "crc32s": [...]},
    ...                                                              (each shard is one line in the file)
    ]}

`offsets` and `sizes` are those of the encoded image itself inside the tar; `labels` is left out (or -1) where unknown;
`crc32s` are the images' own check sums, which tell the damaged images of a damaged shard from the others.
A sample's *id* is its place in the whole set: shards in the order of the manifest, samples in the order of the tar.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import is_location, open_binary

FORMAT = "dfkd-shards/1"
MANIFEST = "manifest.json"
NO_LABEL = -1
_REQUIRED = ("name", "count", "bytes", "sha256", "keys", "offsets", "sizes")
_COLUMNS = ("keys", "members", "offsets", "sizes", "labels", "crc32s")
_COUNT_WIDTH = 16
"""Digits kept for the count in the first line, which is known only when the last shard is written."""


@dataclass(frozen=True)
class Shard:
    """One tar file of a set; `start` is the id of its first sample."""

    name: str
    """Relative to the manifest, or a location of its own (`https://...`, `pipe:...`, an absolute path)."""
    count: int
    bytes: int
    sha256: str
    start: int


@dataclass(frozen=True)
class Manifest:
    """A set of shards.

    Args:
        path: where the manifest was read from (a path or a URL).
        digest: sha256 of the manifest itself: it names the contents of the whole set.
        shards: in order.
        classes: names of the labels, or None where the set has no labels.
        offsets_N: int64, where each image's bytes begin in its tar.
        sizes_N: int64, how many there are.
        labels_N: int64, -1 where unknown.
        held_N: bool, which samples are there at all; None for all. A compiled file may hold a part of a set.
        origin: digest of the set that was compiled; None for a set itself.
    """

    path: str
    digest: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    offsets_N: NDArray[np.int64]
    sizes_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    held_N: NDArray[np.bool_] | None = None
    origin: str | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets_N)

    def starts(self) -> NDArray[np.int64]:
        """`[shards + 1]`: ids at which the shards begin, and the end."""
        return np.array([shard.start for shard in self.shards] + [len(self)], dtype=np.int64)

    def location(self, shard: int) -> str:
        """The full path or URL of a shard."""
        return shard_location(self.path, self.shards[shard].name)

    def where(self, ids_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and index within the shard of each sample id."""
        starts = self.starts()
        shard_n = np.searchsorted(starts, ids_n, side="right") - 1
        return shard_n, ids_n - starts[shard_n]

    def keys(self, shard: int) -> list[str]:
        """Names of a shard's samples, read again from the file (they are not kept in memory)."""
        for number, entry in enumerate(self.entries()):
            if number == shard:
                return [str(key) for key in entry["keys"]]
        raise DatasetError(f"{self.path}: has no shard number {shard}; it has {len(self.shards)}")

    def all_keys(self) -> Iterator[list[str]]:
        """Names of the samples, shard after shard."""
        for entry in self.entries():
            yield [str(key) for key in entry["keys"]]

    def entries(self) -> Iterator[dict[str, Any]]:
        """The shards' own lines, read again from the file; DatasetError if it is another file by now."""
        text = _Text(self.path)
        yield from text.entries()
        if text.digest.hexdigest() != self.digest:
            raise DatasetError(f"{self.path}: changed since it was read first")


def shard_location(manifest: str, name: str) -> str:
    """Where a shard of that name lies, if the manifest lies at `manifest`."""
    if is_location(name):
        return name
    return manifest.rpartition("/")[0] + "/" + name if "/" in manifest else name


def manifest_path(where: str | Path) -> str:
    """A folder or URL of shards, or the manifest itself, to the manifest's location."""
    text = str(where)
    if text.endswith(".json"):
        return text
    return text.rstrip("/") + "/" + MANIFEST


def read_manifest(where: str | Path) -> Manifest:
    """Read a set's manifest.

    Raises:
        DatasetError: it is missing, no manifest, of another format, or contradicts itself; names file and key.
    """
    text = _Text(manifest_path(where))
    shards: list[Shard] = []
    arrays: dict[str, list[NDArray[np.int64]]] = {"offsets": [], "sizes": [], "labels": []}
    start = 0
    for entry in text.entries():
        shards.append(Shard(entry["name"], entry["count"], entry["bytes"], entry["sha256"], start))
        for key, parts in arrays.items():
            parts.append(_numbers(text.path, entry, key))
        start += entry["count"]
    head = text.head
    if not shards:
        raise DatasetError(f"{text.path}: lists no shards")
    if head["count"] != start:
        raise DatasetError(
            f"{text.path}: says count {head['count']}, but its shards hold {start}; it was cut or edited"
        )
    if len({shard.name for shard in shards}) != len(shards):
        raise DatasetError(f"{text.path}: lists a shard twice")
    offsets_N, sizes_N, labels_N = (np.concatenate(parts) for parts in arrays.values())
    classes = _classes(text.path, head.get("classes"), labels_N)
    return Manifest(text.path, text.digest.hexdigest(), tuple(shards), classes, offsets_N, sizes_N, labels_N)


def write_manifest(where: str | Path, entries: Iterable[dict[str, Any]], classes: list[str] | None) -> str:
    """Write `manifest.json` aside and rename it; `entries` are the shards' lines in order. Returns its path.

    Entries are taken one by one, so that they may come from a generator and never lie in memory together.
    """
    path = Path(manifest_path(where))
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(_first_line(classes, 0))
            count, separator = 0, b""
            for entry in entries:
                file.write(separator + json.dumps(entry, separators=(",", ":")).encode())
                count, separator = count + entry["count"], b",\n"
            file.write(b"\n]}\n")
            file.seek(0)
            file.write(_first_line(classes, count))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return str(path)


def _first_line(classes: list[str] | None, count: int) -> bytes:
    """As long for every count: JSON allows spaces there."""
    head = f'{{"format": {json.dumps(FORMAT)}, "classes": {json.dumps(classes)}, "count": {count:<{_COUNT_WIDTH}}'
    return (head + ', "shards": [\n').encode()


class _Text:
    """One pass over a manifest's lines, which are checked and hashed on the way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.head: dict[str, Any] = {}

    def entries(self) -> Iterator[dict[str, Any]]:
        """The shards' lines; raises DatasetError where the file is no manifest or was cut."""
        whole = False
        with open_binary(self.path) as file:
            for number, line in enumerate(file, start=1):
                self.digest.update(line)
                text = line.strip()
                if number == 1:
                    self.head = _head(self.path, text)
                elif text == b"]}":
                    whole = True
                elif text and not whole:
                    yield _entry(self.path, number, text)
        if not self.head:
            raise DatasetError(f"{self.path}: is empty, not a manifest of shards")
        if not whole:
            raise DatasetError(f"{self.path}: ends without its last line, so it was cut")


def _head(path: str, line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line.removesuffix(b"[") + b"[]}")
    except ValueError as error:
        raise DatasetError(f"{path}: not a manifest of shards (first line: {line[:80]!r}): {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise DatasetError(f"{path}: format is {found!r}; allowed: {FORMAT!r}")
    if type(head.get("count")) is not int:
        raise DatasetError(f"{path}: count is {head.get('count')!r}; allowed: a whole number")
    return head


def _entry(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line.removesuffix(b","))
    except ValueError as error:
        raise DatasetError(f"{path}: line {number} is not a shard's entry: {error}") from error
    if not isinstance(entry, dict):
        raise DatasetError(f"{path}: line {number} is not a shard's entry: found {type(entry).__name__}")
    missing = [key for key in _REQUIRED if key not in entry]
    if missing:
        raise DatasetError(f"{path}: line {number}: shard {entry.get('name')!r}: keys {missing} are missing")
    for key, kind in (("name", str), ("sha256", str), ("count", int), ("bytes", int)):
        if type(entry[key]) is not kind:
            raise DatasetError(f"{path}: line {number}: {key} is {entry[key]!r}; allowed: {kind.__name__}")
    for key in _COLUMNS:
        if entry.get(key) is not None and len(entry[key]) != entry["count"]:
            found = f"{len(entry[key])} {key} for a count of {entry['count']}"
            raise DatasetError(f"{path}: shard {entry['name']!r}: {found}")
    return entry


def _numbers(path: str, entry: dict[str, Any], key: str) -> NDArray[np.int64]:
    if entry.get(key) is None:
        return np.full(entry["count"], NO_LABEL, dtype=np.int64)
    where = f"{path}: shard {entry['name']!r}: {key}"
    try:
        numbers = np.asarray(entry[key])
    except ValueError as error:
        raise DatasetError(f"{where}: expected whole numbers: {error}") from error
    if numbers.size and (numbers.ndim != 1 or numbers.dtype.kind != "i"):
        raise DatasetError(f"{where}: expected whole numbers, found {numbers.dtype} {numbers.shape}")
    least = {"offsets": 0, "sizes": 1, "labels": NO_LABEL}[key]
    if numbers.size and int(numbers.min()) < least:
        raise DatasetError(f"{where}: found {int(numbers.min())}, allowed are {least} and more")
    return numbers.astype(np.int64)


def _classes(path: str, names: object, labels_N: NDArray[np.int64]) -> tuple[str, ...] | None:
    highest = int(labels_N.max(initial=NO_LABEL))
    if names is None:
        if highest > NO_LABEL:
            raise DatasetError(f"{path}: classes is null, but labels up to {highest} are used")
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: classes: expected a list of names, found {str(names)[:80]}")
    if highest >= len(names):
        raise DatasetError(f"{path}: labels up to {highest} are used; allowed are -1 .. {len(names) - 1}")
    return tuple(names)
