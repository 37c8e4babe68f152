"""A teacher's answers about a set of shards, kept on disk: unaugmented logits, for selection alone.

`answers.f32` holds fp32 logits `[N, C]` in the order of sample ids (half precision would tie); a row of NaNs stands for
a sample that has no answer (it cannot be read, or is left out). `done.u64` holds eight bytes for every chunk of samples
that are asked about together: a mark, and the CRC-32 of the chunk's rows. A chunk counts only if the sum fits, so one
that was written in part, or whose rows never reached the disk, is asked again and never used.

Bytes are read and written in place and ranges of different chunks do not overlap, so any number of processes may share
the files. They are sparse: what was not asked takes no room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dfkd_dist.data.errors import DatasetError

ANSWERS, DONE, ABOUT = "answers.f32", "done.u64", "about.json"
_MARK = 0x6466_6B64  # "dfkd"
_RECORD = 8


class AnswerCache:
    """One teacher's answers.

    Args:
        folder: holds the caches of all teachers and sets.
        facts: what the answers depend on; another fact is another cache.
        samples: N.
        classes: C.

    Raises:
        DatasetError: the files cannot be made, or the disk has no room for them.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], samples: int, classes: int) -> None:
        self.samples, self.classes = samples, classes
        text = json.dumps({**facts, "samples": samples, "classes": classes}, sort_keys=True)
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self._files: dict[str, int] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._describe(text)
            self._files = {name: os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (ANSWERS, DONE)}
            self._make_room()
        except OSError as error:
            self.close()
            raise DatasetError(f"{self.path}: cannot keep a teacher's answers there: {error.strerror}") from error
        except DatasetError:
            self.close()
            raise

    def has(self, chunk: int) -> bool:
        """Whether the chunk claims to be there; `read` finds out whether it is whole."""
        return self._record(chunk)[0] == _MARK

    def read(self, chunk: int, start: int, count: int) -> Tensor | None:
        """fp32 `[count, C]` about samples `start` and following, or None where they must be asked (again).

        Args:
            chunk: the chunk's number.
            start: its first sample's id.
            count: its samples.
        """
        mark, expected = self._record(chunk)
        if mark != _MARK:
            return None
        rows = os.pread(self._files[ANSWERS], count * self._row, start * self._row)
        if len(rows) != count * self._row or _sum_of(rows, chunk) != expected:
            return None
        return torch.from_numpy(np.frombuffer(bytearray(rows), np.float32).reshape(count, self.classes))

    def write(self, chunk: int, start: int, logits_nC: Tensor) -> None:
        """Keep a chunk's answers: the rows first, then the mark that they are there.

        Raises:
            DatasetError: the disk is full or fails.
        """
        rows = logits_nC.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        record = np.array([_MARK, _sum_of(rows, chunk)], np.uint32).tobytes()
        try:
            _write_all(self._files[ANSWERS], rows, start * self._row)
            _write_all(self._files[DONE], record, chunk * _RECORD)
        except OSError as error:
            raise DatasetError(f"{self.path}: a teacher's answers cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the files."""
        for number in self._files.values():
            os.close(number)
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _row(self) -> int:
        return 4 * self.classes

    def _record(self, chunk: int) -> tuple[int, int]:
        record = os.pread(self._files[DONE], _RECORD, chunk * _RECORD)
        mark, checksum = np.frombuffer(record.ljust(_RECORD, b"\0"), np.uint32).tolist()
        return mark, checksum

    def _describe(self, text: str) -> None:
        """For people: what this folder is about. Whole or not at all; every process writes the same."""
        about = self.path / ABOUT
        if not about.exists():
            aside = self.path / f".{ABOUT}.{os.getpid()}.{id(self)}.tmp"
            aside.write_text(json.dumps(json.loads(text), indent=1) + "\n", encoding="utf-8")
            aside.replace(about)

    def _make_room(self) -> None:
        """Refuse now what would fail hours later."""
        file, size = self._files[ANSWERS], self.samples * self._row
        found = os.fstat(file)
        missing, free = size - found.st_blocks * 512, shutil.disk_usage(self.path).free
        if missing > free:
            raise DatasetError(
                f"{self.path}: a teacher's answers take {size:,} bytes ({self.samples} samples, {self.classes} "
                f"classes), but the disk has {free:,} left; give source.selection.cache a folder with room"
            )
        if found.st_size < size:
            os.ftruncate(file, size)


def _sum_of(rows: bytes, chunk: int) -> int:
    """Also depends on the chunk, so that rows in the wrong place do not pass."""
    return zlib.crc32(rows, chunk & 0xFFFFFFFF)


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
