"""Inputs of single image files: a folder with or without class folders, and lists in CSV, parquet or text files."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import is_location, open_binary
from dfkd_dist.data.shards.inputs import Input, keys_of, names_digest, numbered_labels

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LIST_SUFFIXES = (".csv", ".tsv", ".parquet", ".txt")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "url")
LABEL_COLUMNS = ("label", "class", "target")
_SPLITS = ("train", "val", "test")


class FilesInput(Input):
    """Image files, by name below a root."""

    def __init__(
        self, root: str, names: Sequence[str], labels_N: NDArray[np.int64] | None, classes: Sequence[str] | None
    ) -> None:
        """`root` is a folder or URL; names that are locations by themselves stand alone."""
        self.root = root
        self.names = list(names)
        super().__init__(len(self.names), labels_N, classes)
        self._keys = keys_of(self.names)

    def key(self, i: int) -> str:
        """The file's name below the root, without its suffix."""
        return self._keys[i]

    def read(self, i: int) -> bytes:
        """The whole file."""
        with open_binary(self.where(i)) as file:
            return file.read()

    def described(self) -> str:
        """The root."""
        return self.root

    def where(self, i: int) -> str:
        """The file's location."""
        name = self.names[i]
        return name if is_location(name) else f"{self.root.rstrip('/')}/{name}"

    def identity(self) -> dict[str, Any]:
        """Names and labels, not contents: a million files are not opened to compare."""
        root = self.root if is_location(self.root) else str(Path(self.root).resolve())
        labels = names_digest(map(str, self.labels_N.tolist()))
        return {"kind": self.kind, "path": root, "names": names_digest(self.names), "labels": labels}


class FolderInput(FilesInput):
    """`root/class/**/image`, or images without class folders; of root/train, root/val and root/test one is taken."""

    kind = "folder"

    def __init__(self, root: str, split: str | None = None) -> None:
        """List the files, classes and names sorted; DatasetError if there are none or the folder is a mixture."""
        folder = _split_folder(Path(root), split)
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        passed: Counter[str] = Counter()
        loose = _files(folder, folder, passed, deep=False)
        by_class = [_files(folder, folder / name, passed, deep=True) for name in classes]
        if loose and any(by_class):
            raise DatasetError(f"{folder}: has images both beside and inside folders; allowed is one or the other")
        if passed:
            found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in passed.most_common(5))
            log.warning("%s: files passed over: %s (taken are %s)", folder, found, ", ".join(SUFFIXES))
        names = [name for files in by_class for name in files] or loose
        labels_N = None if loose else np.repeat(np.arange(len(classes)), [len(files) for files in by_class])
        super().__init__(str(folder), names, labels_N, None if loose else classes)


def _split_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    parts = [name for name in _SPLITS if name in folders]
    if not folders or len(parts) < len(folders):  # a class may be called "train", too
        if split is not None:
            raise DatasetError(f"{root}: split {split!r}: this folder has no parts; leave the split out")
        return root
    wanted = split or _SPLITS[0]
    if wanted not in parts:
        raise DatasetError(f"{root}: split {wanted!r} is missing, found {parts}")
    log.info("%s: taking the part %s", root, wanted)
    return root / wanted


def _files(root: Path, folder: Path, passed: Counter[str], *, deep: bool) -> list[str]:
    """Names below the root, sorted; `passed` counts the suffixes of other files."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.append(os.path.relpath(os.path.join(place, name), root))
            else:
                passed[suffix] += 1
    return sorted(found)


class ListInput(FilesInput):
    """Files that a table names: CSV or TSV with a header, parquet, or one path a line in a text file."""

    kind = "list"

    def __init__(
        self,
        path: str,
        *,
        root: str | None = None,
        path_column: str | None = None,
        label_column: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Read the list; paths are relative to `root`, or else to the list's own folder. Raises DatasetError."""
        paths, labels = _read_list(path, path_column, label_column)
        missing = [i for i, name in enumerate(paths) if not name]
        if missing:
            raise DatasetError(f"{path}: image {missing[0]}: its path is empty")
        labels_N, found_classes = (None, None) if labels is None else numbered_labels(labels, classes, path)
        self.path = path
        super().__init__(root or (path.rpartition("/")[0] or "."), paths, labels_N, found_classes)

    def described(self) -> str:
        """The list."""
        return self.path


def _read_list(path: str, path_column: str | None, label_column: str | None) -> tuple[list[str], list[str] | None]:
    if path.endswith(".parquet"):
        table = _parquet(path, path_column, label_column)
    elif path.endswith((".csv", ".tsv")):
        table = _csv(path)
    elif path.endswith(".txt"):
        with open_binary(path) as file:
            return [line for line in (raw.decode().strip() for raw in file) if line], None
    else:
        raise DatasetError(f"{path}: expected a list, allowed are {LIST_SUFFIXES}")
    paths = table[_column(path, list(table), path_column, PATH_COLUMNS, "path column") or ""]
    labels = _column(path, list(table), label_column, LABEL_COLUMNS, None)
    return paths, None if labels is None else table[labels]


def _column(path: str, found: list[str], wanted: str | None, usual: Sequence[str], needed: str | None) -> str | None:
    """The column that was asked for, or the one with a usual name."""
    if wanted is not None and wanted not in found:
        raise DatasetError(f"{path}: column {wanted!r} is missing, found {found}")
    usual_found = [name for name in found if name.lower() in usual]
    if wanted is None and len(usual_found) > 1:
        raise DatasetError(f"{path}: columns {usual_found}: name the one that is meant")
    name = wanted or (usual_found[0] if usual_found else None)
    if name is None and needed:
        raise DatasetError(f"{path}: no {needed} found among {found}; usual names are {list(usual)}, or name it")
    return name


def _csv(path: str) -> dict[str, list[str]]:
    with open_binary(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path}: not a text file: {error}") from error
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.endswith(".tsv") else ",")
    header = next(rows, None)
    if not header:
        raise DatasetError(f"{path}: is empty; expected a header line such as path,label")
    columns: dict[str, list[str]] = {name.strip(): [] for name in header}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise DatasetError(f"{path}: line {number} has {len(row)} columns, its header {len(header)}")
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value.strip())
    return columns


def _parquet(path: str, path_column: str | None, label_column: str | None) -> dict[str, list[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs: pip install 'dfkd-dist[parquet]'") from error
    with open_binary(path) as file:
        data = io.BytesIO(file.read())
    try:
        names = parquet.ParquetFile(data).schema_arrow.names
        usual = (*PATH_COLUMNS, *LABEL_COLUMNS, path_column, label_column)
        table = parquet.read_table(data, columns=[name for name in names if name in usual or name.lower() in usual])
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path}: not a readable parquet file: {error}") from error
    return {
        name: ["" if value is None else str(value) for value in table[name].to_pylist()] for name in table.column_names
    }
