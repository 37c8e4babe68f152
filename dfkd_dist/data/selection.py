"""The file that says which samples of a set of shards are used, so that nobody has to rewrite tars.

JSON lines: a header, then one line for each chosen sample in the order of sample ids (score, label and teacher where
there are such):

    {"format": "dfkd-selection/1", "manifest": "<digest>", "samples": 1000, "count": 2, "criterion": {...},
     "teachers": ["cars"]}                                                                              (one line)
    {"shard": "000000.tar", "index": 3, "key": "000003", "score": 0.0012, "label": 7, "teacher": "cars"}
    {"shard": "000001.tar", "index": 0, "key": "001000", "score": 0.0101, "label": 1, "teacher": "cars"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import open_binary
from dfkd_dist.data.shards.manifest import Manifest

FORMAT = "dfkd-selection/1"
NO_LABEL = -1


@dataclass(frozen=True)
class Chosen:
    """The chosen samples of one shard; `indices_n` int64, the others one for each or None.

    Args:
        indices_n: places in the shard, rising.
        scores_n: fp32.
        labels_n: pseudo-labels.
        teachers_n: numbers of the teachers that are surest of them.
    """

    indices_n: NDArray[np.int64]
    scores_n: NDArray[np.float32] | None = None
    labels_n: NDArray[np.integer[Any]] | None = None
    teachers_n: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class Selection:
    """What a file says.

    Args:
        chosen_N: bool, for every sample of the set.
        labels_N: int32 pseudo-labels, -1 where not chosen or unknown; None if not asked for.
        header: the first line.
    """

    chosen_N: NDArray[np.bool_]
    labels_N: NDArray[np.int32] | None
    header: dict[str, Any]


class SelectionWriter:
    """Writes the file shard by shard, aside; leaving the context without an error renames it.

    Args:
        path: where it will be.
        manifest: of the set.
        count: how many samples will be written in all.
        criterion: how they were chosen, for people and for a later look.
        teachers: names.
    """

    def __init__(
        self, path: Path, manifest: Manifest, count: int, criterion: Mapping[str, Any], teachers: Sequence[str]
    ) -> None:
        self.path, self.manifest, self.count, self.teachers = path, manifest, count, list(teachers)
        self.written = 0
        head = {"format": FORMAT, "manifest": manifest.digest, "samples": len(manifest), "count": count}
        self._head = {**head, "criterion": dict(criterion), "teachers": self.teachers}
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("w", encoding="utf-8")
        except OSError as error:
            raise DatasetError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._file.write(json.dumps(self._head) + "\n")
        return self

    def add(self, shard: int, keys: Sequence[str], chosen: Chosen) -> None:
        """The chosen samples of the next shard; `keys` are the names of all its samples."""
        name = self.manifest.shards[shard].name
        for row, index in enumerate(chosen.indices_n.tolist()):
            line: dict[str, Any] = {"shard": name, "index": index, "key": keys[index]}
            if chosen.scores_n is not None:
                line["score"] = float(chosen.scores_n[row])
            if chosen.labels_n is not None:
                line["label"] = int(chosen.labels_n[row])
            if chosen.teachers_n is not None:
                line["teacher"] = self.teachers[int(chosen.teachers_n[row])]
            self._file.write(json.dumps(line) + "\n")
        self.written += len(chosen.indices_n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if error is None and self.written != self.count:
                raise DatasetError(f"{self.path}: {self.written} samples were written, but {self.count} were chosen")
            if error is None:
                self._aside.replace(self.path)
        except OSError as failure:
            raise DatasetError(f"{self.path}: cannot be written: {failure.strerror}") from failure
        finally:
            self._aside.unlink(missing_ok=True)


def read_selection(path: str | Path, manifest: Manifest, *, labels: bool = False) -> Selection:
    """The mask of the chosen samples, and their pseudo-labels if asked for.

    Raises:
        DatasetError: no such file or of another format; it belongs to another set of shards; it was cut; a line is no
            sample of the set. Names the file, the line, and what was found.
    """
    rows = _rows(str(path))
    header = _header(str(path), next(rows, (1, {}))[1], manifest)
    numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
    chosen_N = np.zeros(len(manifest), bool)
    labels_N = np.full(len(manifest), NO_LABEL, np.int32) if labels else None
    count = 0
    for line, row in rows:
        sample = _id(str(path), line, row, manifest, numbers)
        if chosen_N[sample]:
            raise DatasetError(f"{path}: line {line}: {row['shard']}, index {row['index']} occurs twice")
        chosen_N[sample] = True
        if labels_N is not None:
            labels_N[sample] = _label(str(path), line, row)
        count += 1
    if count != header["count"]:
        raise DatasetError(f"{path}: says count {header['count']}, but holds {count} samples; it was cut or edited")
    return Selection(chosen_N, labels_N, header)


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """(line number, content)."""
    with open_binary(path) as file:
        for number, text in enumerate(file, start=1):
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise DatasetError(f"{path}: line {number} is not JSON: {error}") from error


def _header(path: str, header: Any, manifest: Manifest) -> dict[str, Any]:
    found = header.get("format") if isinstance(header, dict) else type(header).__name__
    if found != FORMAT:
        raise DatasetError(f"{path}: not a selection: format is {found!r}; allowed: {FORMAT!r}")
    if header.get("manifest") not in (manifest.digest, manifest.origin or manifest.digest):
        raise DatasetError(
            f"{path}: it was made for another set of shards (manifest {str(header.get('manifest'))[:12]}... of "
            f"{header.get('samples')} samples) than {manifest.path} ({manifest.digest[:12]}... of {len(manifest)})"
        )
    if not isinstance(header.get("count"), int):
        raise DatasetError(f"{path}: line 1: count is {header.get('count')!r}; allowed: a number")
    return header


def _id(path: str, line: int, row: Any, manifest: Manifest, numbers: Mapping[str, int]) -> int:
    try:
        shard, index = manifest.shards[numbers[row["shard"]]], row["index"]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path}: line {line}: names no shard of {manifest.path}: {str(row)[:80]}") from error
    if type(index) is not int or not 0 <= index < shard.count:
        raise DatasetError(f"{path}: line {line}: index is {index!r}; allowed in {shard.name}: 0 to {shard.count - 1}")
    return shard.start + index


def _label(path: str, line: int, row: Mapping[str, Any]) -> int:
    label = row.get("label", NO_LABEL)
    if type(label) is not int or not NO_LABEL <= label < 2**31:
        raise DatasetError(f"{path}: line {line}: label is {label!r}; allowed: a number, or -1 where unknown")
    return label
