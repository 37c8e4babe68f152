"""Finding the images in a tar that may come from anywhere, by the rules of WebDataset."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import sha256_of
from dfkd_dist.data.shards.manifest import NO_LABEL
from dfkd_dist.data.shards.tar import BLOCK

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_META = re.compile(r"__[^/]*__($|/)")
"""WebDataset passes over such names."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True)
class Indexed:
    """Where one image lies in its tar."""

    key: str
    suffix: str
    offset: int
    size: int
    label: str | None
    """What the sample's member `cls` holds."""


def index_tar(path: Path, where: str) -> list[Indexed]:
    """The images of a plain tar, in order; `where` is what to call it in an error.

    Neighbouring members with the same name up to the first dot are one sample; samples without an image (jpg, jpeg,
    png, webp) are passed over. Raises DatasetError for a tar that is compressed, broken or cut, and for a sample with
    several images.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            samples = [_sample(key, list(parts), where) for key, parts in groupby(_members(tar), lambda part: part[0])]
            _check_end(path, tar.offset, where)
    except tarfile.TarError as error:
        raise DatasetError(f"{where}: not a readable tar: {_compression(path) or error}") from error
    return [sample for sample in samples if sample is not None]


def entry_of(path: Path, name: str, classes: Sequence[str] | None, where: str) -> dict[str, Any]:
    """The manifest entry of a tar that lies at `path` and shall be called `name`. Raises DatasetError."""
    samples = index_tar(path, where)
    head = {"name": name, "count": len(samples), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return {
        **head,
        "keys": [sample.key for sample in samples],
        "members": [sample.suffix for sample in samples],
        "offsets": [sample.offset for sample in samples],
        "sizes": [sample.size for sample in samples],
        "labels": [label_of(sample.label, classes, f"{where}: {sample.key}.cls") for sample in samples],
        "crc32s": [zlib.crc32(data) for data in read_images(path, samples)],
    }


def read_images(path: Path, samples: Sequence[Indexed]) -> Iterator[bytes]:
    """The bytes of each image; fewer than its size where the file ends."""
    with path.open("rb") as file:
        for sample in samples:
            file.seek(sample.offset)
            yield file.read(sample.size)


def label_of(text: str | None, classes: Sequence[str] | None, where: str) -> int:
    """A label as a number, from a number or one of the class names; -1 for None or nothing. Raises DatasetError."""
    if text is None or not text.strip():
        return NO_LABEL
    text = text.strip()
    if classes is not None and text in classes:
        return classes.index(text)
    allowed = "whole numbers (give the class names to use others)" if classes is None else f"0 .. {len(classes) - 1}"
    try:
        number = int(text)
    except ValueError:
        names = "" if classes is None else f", or a name: {', '.join(list(classes)[:5])} ..."
        raise DatasetError(f"{where}: label {text[:40]!r}; allowed: {allowed}{names}") from None
    if number < NO_LABEL or (classes is not None and number >= len(classes)):
        raise DatasetError(f"{where}: label {number}; allowed: {allowed} and -1 for unknown")
    return number


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo, str | None]]:
    """(key, suffix, header, label text) of every file that belongs to a sample."""
    for member in tar:
        key, suffix = base_plus_ext(member.name)
        if not member.isreg() or member.issparse() or key is None or _META.match(member.name):
            continue
        text = None
        if suffix.lower() == "cls" and (file := tar.extractfile(member)) is not None:
            text = file.read().decode("utf-8", "replace")
        yield key, suffix, member, text
        tar.members = []  # type: ignore[attr-defined]  # a long tar would fill the memory with its headers


def _sample(key: str, parts: list[tuple[str, str, tarfile.TarInfo, str | None]], where: str) -> Indexed | None:
    images = [(suffix, member) for _, suffix, member, _ in parts if suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        return None
    if len(images) > 1:
        found = ", ".join(member.name for _, member in images)
        raise DatasetError(f"{where}: sample {key!r} has several images: {found}; allowed is one")
    suffix, member = images[0]
    labels = [text for _, _, _, text in parts if text is not None]
    return Indexed(key, suffix, member.offset_data, member.size, labels[0] if labels else None)


def _check_end(path: Path, offset: int, where: str) -> None:
    """Python's tarfile takes a broken header in the middle for the end; the real end is zeros or nothing."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if block.strip(b"\0"):
        raise DatasetError(f"{where}: not a readable tar: broken header at byte {offset}")


def _compression(path: Path) -> str:
    with path.open("rb") as file:
        found = _COMPRESSED.get(file.read(2))
    return f"it is compressed with {found}; allowed are plain tars" if found else ""
