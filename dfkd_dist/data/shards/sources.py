"""From what a person gives (a path, perhaps a kind) to an input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import is_remote, open_binary
from dfkd_dist.data.shards.input_arrays import ArchiveInput, TorchvisionInput
from dfkd_dist.data.shards.input_files import LIST_SUFFIXES, FolderInput, ListInput
from dfkd_dist.data.shards.input_tars import SetInput, TarInput
from dfkd_dist.data.shards.inputs import Input
from dfkd_dist.data.shards.manifest import MANIFEST

_TAKES: dict[str, tuple[str, ...]] = {
    "folder": ("split",),
    "npz": ("split",),
    "torchvision": ("name", "split"),
    "list": ("root", "path_column", "label_column", "classes"),
    "tar": ("classes",),
    "shards": (),
}
KINDS = tuple(_TAKES)


@dataclass(frozen=True)
class SourceOptions:
    """How to read an input; each kind takes some of them.

    Args:
        name: torchvision: which set.
        split: folder, npz, torchvision: which part.
        root: list: the folder or URL that its paths are relative to.
        path_column: list: the column of paths.
        label_column: list: the column of labels.
        classes: list, tar: names of the classes, in the order of their labels.
    """

    name: str | None = None
    split: str | None = None
    root: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    classes: Sequence[str] | None = None


def open_input(where: str, kind: str | None = None, options: SourceOptions | None = None) -> Input:
    """The input at a path, pattern or URL. Raises DatasetError for what cannot be read and options it cannot take."""
    given = options or SourceOptions()
    kind = kind or kind_of(where)
    if kind not in KINDS:
        raise DatasetError(f"kind: found {kind!r}, allowed are {list(KINDS)}")
    for option in vars(given):
        if getattr(given, option) is not None and option not in _TAKES[kind]:
            takers = [other for other, taken in _TAKES.items() if option in taken]
            raise DatasetError(f"{where}: {option}: a source of kind {kind} takes none; allowed for {takers}")
    if kind == "folder":
        return FolderInput(where, given.split)
    if kind == "npz":
        return ArchiveInput(where, given.split)
    if kind == "torchvision":
        if given.name is None:
            raise DatasetError(f"{where}: a source of kind torchvision needs the set's name, for example CIFAR10")
        return TorchvisionInput(given.name, where, given.split)
    if kind == "list":
        return ListInput(
            where,
            root=given.root,
            path_column=given.path_column,
            label_column=given.label_column,
            classes=given.classes,
        )
    return TarInput(where, given.classes) if kind == "tar" else SetInput(where)


def kind_of(where: str) -> str:
    """What a path looks like; DatasetError if like nothing known."""
    if where.endswith(".json"):
        return "shards"
    if where.endswith(LIST_SUFFIXES):
        return "list"
    if where.endswith(".npz"):
        return "npz"
    if where.endswith(".tar") or where.startswith("pipe:") or "*" in where:
        return "tar"
    if not is_remote(where) and Path(where).is_dir():
        if (Path(where) / MANIFEST).is_file():
            return "shards"
        return "tar" if any(Path(where).glob("*.tar")) else "folder"
    if not is_remote(where) and not Path(where).exists():
        raise DatasetError(f"{where}: no such file or folder")
    raise DatasetError(f"{where}: cannot tell what kind of source it is; say which of {list(KINDS)}")


def read_class_names(path: str) -> list[str]:
    """Class names from a file: a JSON list, or one name a line. Raises DatasetError."""
    with open_binary(path) as file:
        text = file.read().decode("utf-8")
    if path.endswith(".json"):
        names = json.loads(text)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: expected a JSON list of names or one name a line, found {text[:80]!r}")
    if len(set(names)) != len(names):
        raise DatasetError(f"{path}: names a class twice: {sorted({n for n in names if names.count(n) > 1})[:5]}")
    return names
