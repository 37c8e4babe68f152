"""The part of a pool that is on disk: full shards, one after the other, which never change.

The folder is a set of WebDataset shards like any other: `manifest.json`, `000000.tar` and so on, images as png. Beside
each shard lies `000000.safetensors` with what is known of its images, and `pool.json` says whose pool it is.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.encode import Encoding, decode_native, encode
from dfkd_dist.data.shards.files import sha256_of
from dfkd_dist.data.shards.manifest import MANIFEST, read_manifest, write_manifest
from dfkd_dist.data.shards.tar import Sample, write_shard

OWNER, TARGETS = "pool.json", "targets.safetensors"
"""Whose pool the folder is; what is known of all images of a finished one."""
FORMAT = "dfkd-pool/1"
THREADS = 4
"""That encode and decode; torch lets go of Python's lock meanwhile."""
_OURS = re.compile(r"(\d{6,})\.(?:tar|safetensors)")
_REFERENCE = ("name", "count", "bytes", "sha256")


@dataclass(frozen=True)
class Piece:
    """One shard that was written, and the file of facts beside it.

    Args:
        entry: the shard's line in the manifest.
        facts: sha256 of the file of facts.
    """

    entry: Mapping[str, Any]
    facts: str

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.entry["count"])

    def reference(self) -> dict[str, Any]:
        """What a state says of it."""
        return {key: self.entry[key] for key in _REFERENCE} | {"facts": self.facts}


class PoolShards:
    """The shards of one pool.

    Args:
        folder: theirs alone.
        size: images of a shard.
        classes: names of the labels.
        owner: says whose pool it is; a folder with another one's shards is refused.
    """

    def __init__(self, folder: Path, size: int, classes: Sequence[str], owner: Mapping[str, Any]) -> None:
        self.folder, self.size, self.classes = folder, size, list(classes)
        self.owner = {"format": FORMAT, **owner}
        self.pieces: list[Piece] = []
        """Shards that belong to the pool; the same on all ranks."""
        self._claimed = False
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Tensor]] = {}

    # -------------------------------------------------------------------------------------------- writing

    def write(self, parts: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> list[Piece]:
        """Write the next shards, their facts, and then the manifest of all; each file aside and renamed.

        They belong to the pool once they are among `pieces`.

        Args:
            parts: for each shard its images (uint8, on the CPU), and by name what is known of them, with `labels_N`.

        Raises:
            DatasetError: the folder holds something else, or cannot be written.
        """
        try:
            self._claim()
            made: list[Piece] = []
            for images_NCHW, facts in parts:
                made.append(self._write_one(len(self.pieces) + len(made), images_NCHW, facts))
            write_manifest(self.folder, (dict(piece.entry) for piece in [*self.pieces, *made]), self.classes)
        except OSError as error:
            raise DatasetError(f"{self.folder}: the pool cannot be written: {error}") from error
        return made

    def _write_one(self, number: int, images_NCHW: Tensor, facts: Mapping[str, Tensor]) -> Piece:
        first = number * self.size
        encoded = self._executor().map(lambda image_CHW: encode(image_CHW, Encoding()), images_NCHW)
        samples = (
            Sample(f"{first + i:09d}", suffix, data, label)
            for i, ((suffix, data), label) in enumerate(zip(encoded, facts["labels_N"].tolist(), strict=True))
        )
        # The facts first: a shard that is there is complete.
        path = self._facts_path(number)
        _save_facts(path, facts)
        return Piece(write_shard(self.folder / f"{number:06d}.tar", samples), sha256_of(path))

    def seal(self, facts: Mapping[str, Tensor]) -> None:
        """Put the facts of all images into one file that names the manifest, in place of those of each shard.

        Raises:
            DatasetError: the folder cannot be written.
        """
        manifest = read_manifest(self.folder)
        try:
            _save_facts(self.folder / TARGETS, facts, {"manifest": manifest.digest})
            for number in range(len(self.pieces)):
                self._facts_path(number).unlink(missing_ok=True)
        except OSError as error:
            raise DatasetError(f"{self.folder}: the pool cannot be written: {error}") from error

    def _claim(self) -> None:
        """Before the first shard: make the folder this pool's, and remove what no state knows of."""
        if self._claimed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _OURS.fullmatch(path.name))]
        owner = self.folder / OWNER
        if not owner.is_file():
            if found or (self.folder / MANIFEST).exists():
                raise DatasetError(f"{self.folder}: holds shards that are no pool's; choose another folder")
            _write_aside(owner, json.dumps(self.owner) + "\n")
        self._check_owner()
        for number, path in found:
            if number >= len(self.pieces):
                path.unlink()
        for path in [*self.folder.glob(".*.part"), self.folder / TARGETS]:
            path.unlink(missing_ok=True)
        self._claimed = True

    def _check_owner(self) -> None:
        path = self.folder / OWNER
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: does not say whose pool this is: {error}") from error
        if found != self.owner:
            raise DatasetError(f"{self.folder}: is the pool of {found}, not of {self.owner}; choose another folder")

    def _facts_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    # -------------------------------------------------------------------------------------------- reading

    def read(self, ids_n: Tensor) -> Tensor:
        """Images by number, uint8 `[n, C, H, W]` on the CPU.

        Raises:
            DatasetError: a shard cannot be read, or an image in it was altered.
        """
        coming, self._coming = self._coming, {}
        ids = ids_n.tolist()
        for i in ids:
            if i not in coming:
                coming[i] = self._executor().submit(self._read_one, i)
        return torch.stack([coming[i].result() for i in ids])

    def fetch(self, ids_n: Tensor) -> None:
        """These are read next: begin with it."""
        self._coming = {i: self._executor().submit(self._read_one, i) for i in ids_n.tolist()}

    def _read_one(self, i: int) -> Tensor:
        entry = self.pieces[i // self.size].entry
        place = i % self.size
        path = self.folder / entry["name"]
        try:
            with path.open("rb") as file:
                file.seek(entry["offsets"][place])
                data = file.read(entry["sizes"][place])
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read: {error}") from error
        if zlib.crc32(data) != entry["crc32s"][place]:
            raise DatasetError(f"{path}: image {entry['keys'][place]} was altered since it was written")
        return decode_native(data)

    def reopen(self, references: Sequence[Mapping[str, Any]], *, check: bool) -> dict[str, Tensor]:
        """Go on with the shards that a state names; others that lie there are not the pool's.

        Args:
            references: from `Piece.reference`.
            check: compare the bytes with their check sums.

        Returns:
            What is known of their images, by name; empty without shards.

        Raises:
            DatasetError: names the file that is missing or altered.
        """
        self.pieces, self._claimed, self._coming = [], False, {}
        if not references:
            return {}
        self._check_owner()
        entries = list(islice(read_manifest(self.folder).entries(), len(references)))
        facts: list[dict[str, Tensor]] = []
        for number, reference in enumerate(references):
            if number >= len(entries) or any(entries[number][key] != reference[key] for key in _REFERENCE):
                raise DatasetError(f"{self.folder / MANIFEST}: does not list shard {reference['name']} as it was saved")
            self._check_files(number, reference, check=check)
            facts.append(load_file(self._facts_path(number)))
            self.pieces.append(Piece(entries[number], reference["facts"]))
        return {name: torch.cat([part[name] for part in facts]) for name in facts[0]}

    def _check_files(self, number: int, reference: Mapping[str, Any], *, check: bool) -> None:
        shard, facts = self.folder / reference["name"], self._facts_path(number)
        for path in (shard, facts):
            if not path.is_file():
                raise DatasetError(f"{path}: a part of the pool is missing")
        if shard.stat().st_size != reference["bytes"]:
            raise DatasetError(f"{shard}: has {shard.stat().st_size} bytes, not {reference['bytes']}: cut or altered")
        for path, expected in ((shard, reference["sha256"]), (facts, reference["facts"])) if check else ():
            if sha256_of(path) != expected:
                raise DatasetError(f"{path}: does not have the sha256 of the state: altered")

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads, self._coming = None, {}

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pool")
        return self._threads


def _save_facts(path: Path, facts: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: rows.contiguous() for name, rows in facts.items()}, aside, metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
