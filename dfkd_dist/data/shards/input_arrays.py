"""Inputs that lie in one file or in memory: `.npz` archives of arrays or of jpg files, and torchvision's sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.archives import Archive, encoded_images, plain_images
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.part import read_labels
from dfkd_dist.data.readers import torchvision_arrays
from dfkd_dist.data.shards.inputs import Input, file_identity


class ArchiveInput(Input):
    """A `.npz` of arrays (`train_x`, `train_y`, ... or `x`, `y`) or of jpg files (`*_bytes`, `*_offsets`).

    Labels and `classes` may be missing. Image i of jpg files is `bytes[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, path: str, split: str | None = None) -> None:
        """Read a part (train, unless the file has no parts) into memory; DatasetError names the key."""
        self.path = path
        with Archive(path) as archive:
            self.kind = "jpg_npz" if any(f"{part}_bytes" in archive for part in ("x", "train", "test")) else "npz"
            self.part = _part(archive, split, "_bytes" if self.kind == "jpg_npz" else "_x")
            self._images = _images(archive, self.kind, self.part)
            labels_N = _labels(archive, "y" if self.part == "x" else f"{self.part}_y", len(self._images))
            classes = archive.names("classes") if "classes" in archive else None
        super().__init__(len(self._images), labels_N, classes)

    def read(self, i: int) -> bytes | Tensor:
        """The encoded file, or the pixels."""
        image = self._images[i]
        return image if isinstance(image, Tensor) else image.tobytes()

    def described(self) -> str:
        """The archive."""
        return self.path

    def where(self, i: int) -> str:
        """The archive, and the place in it."""
        return f"{self.path}: {self.part} image {i}"

    def identity(self) -> dict[str, Any]:
        """The file as it lies there."""
        return {"kind": self.kind, "part": self.part, **file_identity(self.path)}


def _part(archive: Archive, split: str | None, ending: str) -> str:
    keys = {"x": "x" if ending == "_x" else "x_bytes", "train": f"train{ending}", "test": f"test{ending}"}
    found = [part for part, key in keys.items() if key in archive]
    if "x" in found:
        if split is not None:
            raise DatasetError(f"{archive.path}: split {split!r}: this file has no parts; leave the split out")
        return "x"
    wanted = split or "train"
    if wanted not in found:
        missing = f"{wanted}{ending}"
        raise DatasetError(f"{archive.path}: has no {missing!r}; expected one of {sorted(keys.values())}")
    return wanted


def _images(archive: Archive, kind: str, part: str) -> list[NDArray[np.uint8]] | Tensor:
    if kind == "jpg_npz":
        return encoded_images(archive, part)
    return plain_images(archive, "x" if part == "x" else f"{part}_x")


def _labels(archive: Archive, key: str, images: int) -> NDArray[np.int64] | None:
    if key not in archive:
        return None
    classes = len(archive.names("classes")) if "classes" in archive else None
    return read_labels(f"{archive.path}: key {key!r}", archive.read(key), images, classes).numpy()


class TorchvisionInput(Input):
    """One of torchvision's sets from files that are already there."""

    kind = "torchvision"

    def __init__(self, name: str, root: str, split: str | None = None) -> None:
        """Read a part into memory; DatasetError for an unknown name or missing files."""
        self.name, self.root, self.part = name, root, split or "train"
        self._images_NCHW, labels_N, classes = torchvision_arrays(name, root, self.part)
        super().__init__(len(self._images_NCHW), labels_N.numpy(), classes)

    def read(self, i: int) -> Tensor:
        """The pixels."""
        return self._images_NCHW[i]

    def described(self) -> str:
        """The set and where it lies."""
        return f"{self.root}: torchvision's {self.name}"

    def where(self, i: int) -> str:
        """The set, and the place in it."""
        return f"{self.described()}, {self.part} image {i}"

    def identity(self) -> dict[str, Any]:
        """torchvision itself checks the files of a named set."""
        root = str(Path(self.root).resolve())
        return {"kind": self.kind, "name": self.name, "part": self.part, "path": root, "count": len(self)}
