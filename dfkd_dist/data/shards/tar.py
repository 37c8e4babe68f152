"""Writing one WebDataset shard, with its entry in the manifest."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import webdataset

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import NO_LABEL

BLOCK = 512
"""A tar consists of blocks; each member begins with a header of one block."""


@dataclass(frozen=True)
class Sample:
    """One encoded image on its way into a shard."""

    key: str
    """Without dots in its last part, so that WebDataset finds where the suffix begins."""
    suffix: str
    """jpg, png or webp: what the bytes are, whatever the file was called."""
    data: bytes
    label: int = NO_LABEL


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write a tar aside and rename it; returns its manifest entry.

    Equal samples give equal bytes: no time, user or machine gets into the tar. A label is a member `KEY.cls`
    in front of its image. Raises DatasetError for a key that does not fit into a tar header, or for no samples.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    columns: dict[str, list[Any]] = {name: [] for name in ("keys", "members", "offsets", "sizes", "labels", "crc32s")}
    try:
        with aside.open("wb") as file:
            out = _Hashed(file)
            with webdataset.TarWriter(out, user="dfkd", group="dfkd", mtime=0, encoder=False) as writer:
                for sample in samples:
                    _append(writer, sample, columns)
            if not columns["keys"]:
                raise DatasetError(f"{path}: a shard needs at least one sample")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    head = {"name": path.name, "count": len(columns["keys"]), "bytes": out.bytes, "sha256": out.digest.hexdigest()}
    return {**head, **columns}


def _append(writer: Any, sample: Sample, columns: dict[str, list[Any]]) -> None:
    members: dict[str, Any] = {"__key__": sample.key, sample.suffix: sample.data}
    if sample.label != NO_LABEL:
        members["cls"] = str(sample.label).encode()
    try:
        writer.write(members)
    except ValueError as error:
        raise DatasetError(f"sample {sample.key!r} does not fit into a tar: {error}") from error
    # Members are written in the order of their suffixes, and cls comes before every image's.
    padded = -(-len(sample.data) // BLOCK) * BLOCK
    columns["keys"].append(sample.key)
    columns["members"].append(sample.suffix)
    columns["offsets"].append(writer.tarstream.offset - padded)
    columns["sizes"].append(len(sample.data))
    columns["labels"].append(sample.label)
    columns["crc32s"].append(zlib.crc32(sample.data))


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)
