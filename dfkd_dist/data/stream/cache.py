"""Whole shards kept in a folder of this machine's disk, shared by all processes, within a limit.

A file is named by the sha256 of its contents, so it is right by definition, and equal shards are kept once. It is
written aside (`.part`), checked and renamed. Locks (flock, which the system releases when a process dies) see to it
that one process fetches a shard while others wait for it, and that no shard goes while somebody reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Passing

log = logging.getLogger(__name__)

WAIT_S = 0.1
Write = Callable[[bytes], None]


class DiskCache:
    """A folder of shards.

    Args:
        folder: made if missing.
        limit_bytes: of all files together; those used least recently go first.

    Raises:
        DatasetError: the folder cannot be made.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"reader.cache.folder: {folder} cannot be made: {error}") from error

    @contextmanager
    def open(self, sha256: str, size: int, fetch: Callable[[Write], None]) -> Iterator[int]:
        """A shard's open file, which stays in the folder as long as the context lasts; fetched if it is not there.

        Args:
            sha256: of its contents.
            size: in bytes.
            fetch: brings the contents, piece by piece, to the function that it is given.

        Raises:
            Passing: `checksum`; and what `fetch` raises.
            DatasetError: the disk is full or broken.
        """
        try:
            file = self._hold(sha256, size, fetch)
        except OSError as error:
            raise DatasetError(f"reader.cache.folder: {self.folder} cannot be used: {error}") from error
        try:
            yield file
        finally:
            os.close(file)

    def _hold(self, sha256: str, size: int, fetch: Callable[[Write], None]) -> int:
        file = self._take(sha256, size)
        while file is None:
            with _locked(self.folder / f"{sha256}.lock"):
                file = self._take(sha256, size)
                if file is None:
                    self._bring(sha256, size, fetch)
                    file = self._take(sha256, size)
        return file

    def _take(self, sha256: str, size: int) -> int | None:
        """Open a shard that is there, and hold it."""
        path = self.folder / f"{sha256}.tar"
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file)
        if found.st_nlink == 0 or found.st_size != size:  # it went before it was held, or a power cut emptied it
            os.close(file)
            if found.st_nlink:
                path.unlink(missing_ok=True)
            return None
        with suppress(PermissionError):  # of another user: that one's own reading keeps it young
            os.utime(file)
        return file

    def _bring(self, sha256: str, size: int, fetch: Callable[[Write], None]) -> None:
        part = self.folder / f"{sha256}.part"
        digest = hashlib.sha256()
        try:
            with self._reserved(part, size) as file:

                def write(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)
                    if file.tell() > size:
                        raise Passing("checksum", f"more than the {size} bytes that the manifest says")

                fetch(write)
                came = file.tell()
            if (came, digest.hexdigest()) != (size, sha256):
                found = f"{came} bytes with sha256 {digest.hexdigest()}"
                raise Passing("checksum", f"{found}; the manifest says {size} bytes with sha256 {sha256}")
            part.rename(self.folder / f"{sha256}.tar")
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _reserved(self, part: Path, size: int) -> Iterator[BinaryIO]:
        """A file that takes up its room from the start, so that all who fetch at once stay within the limit."""
        while True:
            with _locked(self.folder / "folder.lock"):
                if self._make_room(size):
                    file = part.open("wb")
                    file.truncate(size)
                    break
            time.sleep(WAIT_S)
        with file:
            yield file

    def _make_room(self, size: int) -> bool:
        """Let shards go until `size` bytes more fit; False if too much is in use just now."""
        there = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue
                there.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(bytes for _, bytes, _ in there) + size - self.limit_bytes
        for _, bytes, path in sorted(there):
            if excess <= 0:
                break
            if _let_go(path):
                excess -= bytes
        return excess <= 0


def _let_go(path: Path) -> bool:
    """Remove a shard that nobody reads, or what a dead process left of one; False if it is in use."""
    lock = path if path.suffix == ".tar" else path.with_suffix(".lock")
    try:
        file = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    log.debug("%s: let go", path)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
