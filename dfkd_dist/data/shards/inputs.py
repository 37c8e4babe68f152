"""What shards are built from: an ordered list of samples that are read by number, whatever kind of source it is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.index import label_of
from dfkd_dist.data.shards.manifest import NO_LABEL

_NAME_BYTES = 90
"""A tar header of the plainest kind has room for 100, suffix included."""


class Input(ABC):
    """An ordered list of images, encoded or raw, with optional labels; `read` must work in any process."""

    kind: str

    def __init__(self, count: int, labels_N: NDArray[np.int64] | None, classes: Sequence[str] | None) -> None:
        """Keep the labels (-1: unknown); DatasetError for none at all or for labels outside of the classes."""
        if count == 0:
            raise DatasetError(f"{self.described()}: found no images")
        self._count = count
        self.labels_N = np.full(count, NO_LABEL, dtype=np.int64) if labels_N is None else labels_N
        highest = int(self.labels_N.max())
        if classes is None and highest > NO_LABEL:
            classes = [str(i) for i in range(highest + 1)]
        if classes is not None and not NO_LABEL <= int(self.labels_N.min()) <= highest < len(classes):
            found = f"{int(self.labels_N.min())} .. {highest}"
            raise DatasetError(f"{self.described()}: labels {found}; allowed are -1 .. {len(classes) - 1}")
        self.classes = None if classes is None or highest == NO_LABEL else list(classes)

    def __len__(self) -> int:
        """Number of images."""
        return self._count

    def key(self, i: int) -> str:
        """The name of image i in its shard; by default its number."""
        return f"{i:09d}"

    @abstractmethod
    def read(self, i: int) -> bytes | Tensor:
        """Image i as an encoded file or as uint8 `[1 or 3, H, W]`; raises DatasetError."""

    @abstractmethod
    def described(self) -> str:
        """The source, for messages."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Image i, for messages."""

    def lies_in(self, folder: Path) -> bool:
        """Whether building there could overwrite the source."""
        return False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a resumed build compares, as JSON: other contents should (as far as is cheap) give another answer."""


def file_identity(path: str) -> dict[str, Any]:
    """Absolute path, size and time of change of a local file."""
    facts = Path(path).stat()
    return {"path": str(Path(path).resolve()), "bytes": facts.st_size, "changed": facts.st_mtime_ns}


def names_digest(names: Iterable[str]) -> str:
    """A short check sum of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def keys_of(names: Sequence[str]) -> list[str]:
    """Names of files to names of samples: without suffix, unlike each other, fit for a tar that WebDataset reads."""
    taken: set[str] = set()
    keys = []
    for i, name in enumerate(names):
        key = _key_of(name)
        if not key or len(key.encode()) > _NAME_BYTES:
            key = f"{i:09d}"
        while key in taken:
            key = f"{key[-60:]}-{i}" if len(key.encode()) < _NAME_BYTES - 12 else f"{i:09d}"
        taken.add(key)
        keys.append(key)
    return keys


def _key_of(name: str) -> str:
    parts = [part for part in name.rpartition("://")[2].split("/") if part not in ("", ".", "..")]
    if not parts:
        return ""
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    text = "/".join([*parts[:-1], stem.replace(".", "_")])
    printable = "".join(char if char.isprintable() else "_" for char in text.encode("utf-8", "replace").decode())
    # WebDataset passes over members whose names begin and end like this.
    return "x" + printable if printable.startswith("__") else printable


def numbered_labels(
    texts: Sequence[str | None], classes: Sequence[str] | None, where: str
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels that were written as numbers or names, as numbers, and the names of the classes.

    Without `classes`, whole numbers are labels themselves and anything else is the name of a class (sorted). Nothing
    written means unknown. Raises DatasetError naming the line.
    """
    stripped = [(text or "").strip() for text in texts]
    names = None if classes is None else list(classes)
    if names is None and not all(_is_number(text) for text in stripped if text):
        names = sorted({text for text in stripped if text})
    numbers = {text: label_of(text, names, f"{where}: image {i}") for i, text in _first_uses(stripped)}
    return np.array([numbers[text] for text in stripped], dtype=np.int64), names


def _first_uses(texts: Sequence[str]) -> list[tuple[int, str]]:
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    return [(i, text) for text, i in first.items()]


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
