"""The list of samples that could not be used: `quarantine.jsonl` of a run, and the limit on their share."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Bad

FILE = "quarantine.jsonl"
ENOUGH = 100
"""So many samples must have been asked for before their share says anything."""


class Quarantine:
    """Lists each bad sample once, however often it comes up, on whichever rank, before or after a resume.

    All ranks append to one file. Whoever appends locks it first and reads what others have added, so that no sample is
    listed twice and no two lines mix. Where a file system knows no locks each line is still one appending write.

    Args:
        folder: the run's; None keeps the list in memory.
        rank: who found a sample, for the list.

    `counts` has the samples of each cause that this rank knows of: its own, what the file held at the start, and
    whatever others had added when it last added something itself.
    """

    def __init__(self, folder: str | Path | None, rank: int = 0) -> None:
        self.rank = rank
        self.counts: Counter[str] = Counter()
        self.asked = 0
        """Samples that this process asked for; one that came up twice counts twice."""
        self.bad = 0
        """How many of them could not be used."""
        self._path = None if folder is None else Path(folder) / FILE
        self._listed: set[int] = set()
        self._position = 0
        self._causes: Counter[str] = Counter()
        if self._path is not None and self._path.exists():
            with self._path.open("rb") as file:
                self._catch_up(file.read())

    def add(self, bad: Sequence[Bad], asked: int) -> None:
        """Count `asked` samples, of which `bad` could not be used, and list those that are new."""
        self.asked += asked
        self.bad += len(bad)
        self._causes.update(sample.cause for sample in bad)
        if bad and any(sample.id not in self._listed for sample in bad):
            self._append(bad)

    def check(self, limit: float) -> None:
        """Raises DatasetError if the share of bad samples is above the limit, once `ENOUGH` have been asked for."""
        if self.asked < ENOUGH or self.bad <= limit * self.asked:
            return
        causes = ", ".join(f"{cause} {count}" for cause, count in self._causes.most_common())
        where = "" if self._path is None else f"; they are listed in {self._path}"
        found = f"{self.bad} of {self.asked} samples ({self.bad / self.asked:.1%}) could not be used ({causes})"
        raise DatasetError(f"{found}; allowed by reader.bad_limit: {limit:.1%}{where}")

    def _append(self, bad: Sequence[Bad]) -> None:
        if self._path is None:
            for sample in bad:
                self._note(sample.id, sample.cause)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            torn = self._catch_up(_rest(file, self._position))
            lines = ["\n"] if torn else []
            for sample in bad:
                if sample.id not in self._listed:
                    self._note(sample.id, sample.cause)
                    lines.append(json.dumps({**asdict(sample), "rank": self.rank}) + "\n")
            os.write(file, "".join(lines).encode())
            self._position = os.fstat(file).st_size
        finally:
            os.close(file)

    def _catch_up(self, data: bytes) -> bool:
        """Take in whole lines that were added behind `_position`; whether half a line follows them."""
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            entry = _entry(line)
            if entry is not None:
                self._note(entry["id"], entry["cause"])
        return len(whole) < len(data)

    def _note(self, sample: int, cause: str) -> None:
        if sample not in self._listed:
            self._listed.add(sample)
            self.counts[cause] += 1


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of the list, or None where a crash left half of one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("id"), int) and "cause" in entry else None


def _rest(file: int, position: int) -> bytes:
    parts = []
    while data := os.pread(file, 2**20, position):
        parts.append(data)
        position += len(data)
    return b"".join(parts)
