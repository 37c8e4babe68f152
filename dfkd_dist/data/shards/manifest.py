"""`manifest.json`: what a set of shards holds and where each image lies in its tar.

The file is ordinary JSON, but with one shard to a line, so that a set of any size is read line by line in the memory of
one shard (its numbers go to arrays at once).

    {"format": "dfkd-shards/1", "classes": ["cat", "dog"], "count": 1500, "shards": [
    {"name": "000000.tar", "count": 1000, "bytes": 2097152, "sha256": "...",
     "keys": [...], "members": ["jpg", ...], "offsets": [...], "sizes": [...], "labels": [...]},      (one line)
    ...
    ]}

`offsets` and `sizes` are those of the encoded image itself inside the tar; `labels` is left out (or -1) where unknown.
A sample's *id* is its place in the whole set: shards in the order of the manifest, samples in the order of the tar.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError

FORMAT = "dfkd-shards/1"
MANIFEST = "manifest.json"
_KEYS = ("name", "count", "bytes", "sha256", "keys", "offsets", "sizes")


@dataclass(frozen=True)
class Shard:
    """One tar file of a set; `start` is the id of its first sample."""

    name: str
    """Relative to the manifest, or a location of its own (`https://...`, `pipe:...`)."""
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
    """

    path: str
    digest: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    offsets_N: NDArray[np.int64]
    sizes_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets_N)

    def starts(self) -> NDArray[np.int64]:
        """`[shards + 1]`: ids at which the shards begin, and the end."""
        return np.array([shard.start for shard in self.shards] + [len(self)], dtype=np.int64)

    def location(self, shard: int) -> str:
        """The full path or URL of a shard."""
        name = self.shards[shard].name
        if "://" in name or name.startswith(("pipe:", "/")):
            return name
        return self.path.rpartition("/")[0] + "/" + name if "/" in self.path else name

    def where(self, ids_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and index within the shard of each sample id."""
        starts = self.starts()
        shard_n = np.searchsorted(starts, ids_n, side="right") - 1
        return shard_n, ids_n - starts[shard_n]

    def keys(self, shard: int) -> list[str]:
        """Names of a shard's samples, read again from the file (they are not kept in memory)."""
        for number, entry in enumerate(_entries(self.path)):
            if number == shard:
                return [str(key) for key in entry["keys"]]
        raise DatasetError(f"{self.path}: has no shard number {shard}; it has {len(self.shards)}")

    def all_keys(self) -> Iterator[list[str]]:
        """Names of the samples, shard after shard."""
        for entry in _entries(self.path):
            yield [str(key) for key in entry["keys"]]


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
    path = manifest_path(where)
    shards: list[Shard] = []
    arrays: dict[str, list[NDArray[np.int64]]] = {"offsets": [], "sizes": [], "labels": []}
    start = 0
    for entry in _entries(path):
        _check(path, entry)
        count = int(entry["count"])
        shards.append(Shard(str(entry["name"]), count, int(entry["bytes"]), str(entry["sha256"]), start))
        for key, parts in arrays.items():
            parts.append(np.asarray(entry.get(key) or [-1] * count, dtype=np.int64))
        start += count
    if not shards:
        raise DatasetError(f"{path}: lists no shards")
    head = _head(path)
    if head["count"] != start:
        raise DatasetError(f"{path}: says count {head['count']}, but its shards hold {start}; it was cut or edited")
    classes = tuple(head["classes"]) if head.get("classes") is not None else None
    offsets_N, sizes_N, labels_N = (np.concatenate(parts) for parts in arrays.values())
    return Manifest(path, _digest(path), tuple(shards), classes, offsets_N, sizes_N, labels_N)


def write_manifest(where: str | Path, entries: Iterable[dict[str, Any]], classes: list[str] | None) -> str:
    """Write `manifest.json` aside and rename it; `entries` are the shards' lines in order. Returns its path."""
    path = Path(manifest_path(where))
    lines = [json.dumps(entry, separators=(",", ":")) for entry in entries]
    count = sum(json.loads(line)["count"] for line in lines)
    head = json.dumps({"format": FORMAT, "classes": classes, "count": count})
    aside = path.with_name(path.name + ".part")
    aside.write_text(head[:-1] + ', "shards": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    aside.replace(path)
    return str(path)


def _lines(path: str) -> Iterator[str]:
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError, ValueError, ImportError) as error:
        raise DatasetError(f"{path}: cannot be read as a manifest of shards: {error}") from error


def _head(path: str) -> dict[str, Any]:
    first = next(_lines(path), "")
    try:
        head = json.loads(first.rstrip().removesuffix("[") + "[]}")
    except ValueError as error:
        raise DatasetError(f"{path}: not a manifest of shards (first line: {first[:80]!r}): {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise DatasetError(f"{path}: format is {found!r}; allowed: {FORMAT!r}")
    return head


def _entries(path: str) -> Iterator[dict[str, Any]]:
    """The shards' lines; raises DatasetError where the file is no manifest or was cut."""
    _head(path)
    lines = _lines(path)
    next(lines)
    for number, line in enumerate(lines, start=2):
        text = line.strip()
        if text == "]}":
            return
        try:
            yield json.loads(text.removesuffix(","))
        except ValueError as error:
            raise DatasetError(f"{path}: line {number} is not a shard's entry: {error}") from error
    raise DatasetError(f"{path}: ends without its last line, so it was cut")


def _check(path: str, entry: dict[str, Any]) -> None:
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        raise DatasetError(f"{path}: shard {entry.get('name')!r}: keys {missing} are missing")
    for key in ("keys", "offsets", "sizes", "labels"):
        if entry.get(key) is not None and len(entry[key]) != entry["count"]:
            found = f"{len(entry[key])} {key} for a count of {entry['count']}"
            raise DatasetError(f"{path}: shard {entry['name']!r}: {found}")


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    for line in _lines(path):
        digest.update(line.encode())
    return digest.hexdigest()
