"""Image sets in one `.npz` file: plain arrays, or jpg files laid back to back. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.decode import decode_many
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import MemoryImageSet
from dfkd_dist.data.part import Part, Split, read_labels, train_or_test
from dfkd_dist.data.pixels import convert_images


class Archive:
    """A `.npz` file whose errors name the file, the key, what was found and what is allowed."""

    def __init__(self, path: str) -> None:
        """Open the file; DatasetError if it is missing or no archive."""
        self.path = path
        if not Path(path).is_file():
            raise DatasetError(f"{path}: no such file")
        try:
            archive = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path}: not a readable .npz archive: {error}") from error
        if not isinstance(archive, NpzFile):
            raise DatasetError(f"{path}: expected a .npz archive, found a single array")
        self._archive = archive

    def __enter__(self) -> Archive:
        """Use as a context manager, which closes the file."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self._archive.close()

    def __contains__(self, key: str) -> bool:
        """Whether the archive has an array of that name."""
        return key in self._archive.files

    def read(self, key: str) -> NDArray[Any]:
        """Read one array (each call decompresses it: read once); DatasetError if missing or unreadable."""
        if key not in self:
            raise DatasetError(f"{self.path}: key {key!r} is missing, found {sorted(self._archive.files)}")
        try:
            return np.asarray(self._archive[key])
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DatasetError(f"{self.path}: key {key!r} cannot be read: {error}") from error

    def names(self, key: str) -> list[str]:
        """Read a list of strings."""
        array = self.read(key)
        if array.ndim != 1 or array.dtype.kind != "U":
            raise DatasetError(f"{self.path}: key {key!r}: expected strings [N], found {array.dtype} {array.shape}")
        return [str(name) for name in array]


def read_npz(spec: DatasetSpec, split: Split) -> Part:
    """Plain uint8 images `[N, H, W]` or `[N, H, W, 1 or 3]`: `train_x, train_y, test_x, test_y`."""
    part = _part(split)
    with Archive(str(spec.path)) as archive:
        images_NCHW = plain_images(archive, f"{part}_x")
        labels_N, classes = _labels(archive, part, len(images_NCHW))

    def make(positions: Tensor) -> MemoryImageSet:
        converted = convert_images(images_NCHW[positions], size=spec.size, channels=spec.channels)
        return MemoryImageSet(converted, labels_N[positions], classes)

    return Part(torch.arange(len(labels_N)), labels_N, classes, make, carve=part == "train")


def read_jpg_npz(spec: DatasetSpec, split: Split) -> Part:
    """Encoded images: `train_bytes, train_offsets, train_y`, the same for test; or `x_bytes, x_offsets, y`.

    Image i is bytes[offsets[i] : offsets[i + 1]]. Without a split, a fixed fifth of each class (of each
    domain) is the test part; `domain` (integers) and `domains` (names) then allow `spec.domains`, which never
    moves an image between the parts.
    """
    with Archive(str(spec.path)) as archive:
        if "x_bytes" in archive:
            return _unsplit(archive, spec, split)
        part = _part(split)
        if f"{part}_bytes" in archive and not any(key in archive for key in ("train_y", "test_y", "y")):
            raise DatasetError(
                f"{spec.path}: has images but no labels ({part}_y); "
                "use it as an unlabelled stream, not as a labelled image set"
            )
        if spec.domains is not None:
            raise DatasetError(f"{spec.path}: domains: this file has none; leave `domains` out")
        encoded = encoded_images(archive, part)
        labels_N, classes = _labels(archive, part, len(encoded))
    positions = torch.arange(len(labels_N))
    return _jpg_part(spec, encoded, positions, labels_N, classes, carve=part == "train")


def _unsplit(archive: Archive, spec: DatasetSpec, split: Split) -> Part:
    encoded = encoded_images(archive, "x")
    classes = archive.names("classes") if "classes" in archive else None
    where = f"{archive.path}: key 'y'"
    labels_N = read_labels(where, archive.read("y"), len(encoded), None if classes is None else len(classes))
    classes = classes or _numbered(int(labels_N.max()) + 1)
    strata_N, wanted_N = labels_N, torch.ones(len(labels_N), dtype=torch.bool)
    if "domain" in archive:
        domains = archive.names("domains")
        domain_N = read_labels(f"{archive.path}: key 'domain'", archive.read("domain"), len(encoded), len(domains))
        strata_N = domain_N * len(classes) + labels_N
        wanted_N = torch.isin(domain_N, _domain_numbers(spec, domains))
    elif spec.domains is not None:
        raise DatasetError(f"{archive.path}: domains: this file has none; leave `domains` out")
    positions = train_or_test(strata_N, split)
    positions = positions[wanted_N[positions]]
    return _jpg_part(spec, encoded, positions, labels_N, classes, carve=split != "test", strata_N=strata_N)


def _domain_numbers(spec: DatasetSpec, domains: list[str]) -> Tensor:
    wanted = domains if spec.domains is None else spec.domains
    unknown = [name for name in wanted if name not in domains]
    if unknown or not wanted:
        raise DatasetError(f"{spec.path}: domains: found {unknown or wanted}, allowed are {domains}")
    return torch.tensor([domains.index(name) for name in wanted])


def _jpg_part(
    spec: DatasetSpec,
    encoded: Sequence[NDArray[np.uint8]],
    positions: Tensor,
    labels_N: Tensor,
    classes: list[str],
    *,
    carve: bool,
    strata_N: Tensor | None = None,
) -> Part:
    def make(chosen: Tensor) -> MemoryImageSet:
        numbers = chosen.tolist()
        images_NCHW = decode_many(
            len(numbers),
            lambda i: encoded[numbers[i]],
            lambda i: f"{spec.path}: image {numbers[i]}",
            size=spec.size,
            channels=spec.channels,
        )
        return MemoryImageSet(images_NCHW, labels_N[chosen], classes)

    return Part(positions, labels_N, classes, make, carve=carve, strata_N=strata_N)


def _part(split: Split) -> Literal["train", "test"]:
    """Validation images come out of the train part."""
    return "test" if split == "test" else "train"


def plain_images(archive: Archive, key: str) -> Tensor:
    """uint8 `[N, 1 or 3, H, W]` of an array `[N, H, W]` or `[N, H, W, 1 or 3]`; DatasetError for another."""
    images = archive.read(key)
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] in (1, 3))):
        allowed = "uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        raise DatasetError(f"{archive.path}: key {key!r}: expected {allowed}, found {images.dtype} {images.shape}")
    if 0 in images.shape:
        raise DatasetError(f"{archive.path}: key {key!r}: expected images with pixels, found shape {images.shape}")
    tensor = torch.from_numpy(images)
    return tensor[:, None] if grey else tensor.permute(0, 3, 1, 2)


def encoded_images(archive: Archive, part: str) -> list[NDArray[np.uint8]]:
    """Views of the single files: `{part}_bytes` cut at `{part}_offsets`; DatasetError for anything else."""
    data, offsets = archive.read(f"{part}_bytes"), archive.read(f"{part}_offsets")
    if data.ndim != 1 or data.dtype != np.uint8:
        found = f"{data.dtype} {data.shape}"
        raise DatasetError(f"{archive.path}: key '{part}_bytes': expected uint8 [bytes], found {found}")
    where = f"{archive.path}: key '{part}_offsets'"
    if offsets.ndim != 1 or len(offsets) < 2 or not np.issubdtype(offsets.dtype, np.integer):
        raise DatasetError(f"{where}: expected integers [N + 1], found {offsets.dtype} {offsets.shape}")
    starts = offsets.astype(np.int64)
    if starts[0] < 0 or starts[-1] > len(data) or (np.diff(starts) < 0).any():
        found = f"{starts.min()} .. {starts.max()}"
        raise DatasetError(f"{where}: expected numbers that rise within 0 .. {len(data)}, found {found}")
    ends = starts.tolist()
    return [data[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _labels(archive: Archive, part: str, images: int) -> tuple[Tensor, list[str]]:
    """Labels of a part and class names; without names, the labels of both parts say how many there are."""
    classes = archive.names("classes") if "classes" in archive else None
    key = f"{part}_y"
    limit = None if classes is None else len(classes)
    labels_N = read_labels(f"{archive.path}: key {key!r}", archive.read(key), images, limit)
    if classes is not None:
        return labels_N, classes
    other_key = "test_y" if part == "train" else "train_y"
    other = archive.read(other_key)
    other_N = read_labels(f"{archive.path}: key {other_key!r}", other, len(other), None)
    return labels_N, _numbered(1 + max(int(labels_N.max()), int(other_N.max())))


def _numbered(count: int) -> list[str]:
    return [str(i) for i in range(count)]
