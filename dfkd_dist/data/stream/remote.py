"""Shards that lie elsewhere, read in pieces through fsspec: with time limits, and again where that failed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Passing, Unusable
from dfkd_dist.data.stream.stores import Place, Span

T = TypeVar("T")
log = logging.getLogger(__name__)

AT_ONCE = 8
"""Requests under way from one process."""
PIECE = 4 * 2**20
"""Largest request, in bytes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
COOL_DOWN_S = 60.0
"""A shard that failed after all tries is not tried again so soon: its samples fail at once."""
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING = {408, 425, 429}
_BEYOND_THE_END = 416
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class RemoteFile:
    """One file that fsspec reaches.

    Args:
        location: its URL.
        timeout_s: a request that takes longer has failed (file systems without asyncio have limits of their own).

    Raises:
        ImportError, DatasetError: nothing here speaks the URL's protocol.
    """

    def __init__(self, location: str, timeout_s: float) -> None:
        try:
            self._system, self._path = fsspec.core.url_to_fs(location)
        except ImportError as error:
            extra = _EXTRAS.get(location.partition("://")[0], "remote")
            raise ImportError(f"{location} needs: pip install 'dfkd-dist[{extra}]' ({error})") from error
        except ValueError as error:
            raise DatasetError(f"{location}: cannot be opened: {error}") from error
        self._timeout_s = timeout_s

    def get(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer at the end, and all of the file from a server that knows no ranges."""
        try:
            return self._request(offset, size)
        except Exception as error:
            if getattr(error, "status", None) == _BEYOND_THE_END:
                return b""
            raise

    def piece(self, offset: int, size: int) -> tuple[bytes, int]:
        """The bytes, and how many came over the network for them. Raises ShortRead if fewer than asked for came."""
        came = self.get(offset, size)
        data = came[offset : offset + size] if len(came) > size else came
        if len(data) != size:
            raise ShortRead(data, f"{len(data)} of {size} bytes came from offset {offset}")
        return data, len(came)

    def rest(self, offset: int, size: int) -> bytes:
        """The bytes, or all from `offset` on where a server knows no ranges. Raises ShortRead as `piece` does."""
        came = self.get(offset, size)
        if len(came) > size:
            return came[offset:]
        if len(came) < size:
            raise ShortRead(came, f"{len(came)} of {size} bytes came from offset {offset}")
        return came

    def _request(self, offset: int, size: int) -> bytes:
        end = offset + size
        if isinstance(self._system, fsspec.asyn.AsyncFileSystem):
            get = self._system._cat_file
            return bytes(fsspec.asyn.sync(self._system.loop, get, self._path, offset, end, timeout=self._timeout_s))
        return bytes(self._system.cat_file(self._path, offset, end))


class ShortRead(EOFError):
    """Fewer bytes came than were asked for."""

    def __init__(self, data: bytes, message: str) -> None:
        super().__init__(message)
        self.data = data


def persistently(act: Callable[[], T], retries: int, what: str) -> T:
    """Do it, again after growing waits if it fails.

    Raises:
        Unusable: `missing` at once for a file that is not there or is refused; after the last try `unreachable`, or
            the cause that a `Passing` has.
        ShortRead: the last try gave too little.
    """
    for tried in range(retries + 1):
        try:
            return act()
        except (ImportError, MemoryError, DatasetError, Unusable):
            raise
        except Exception as error:  # every protocol has its own; none of them may stop a run
            if isinstance(error, _GONE) or _is_refused(error):
                raise Unusable("missing", f"{what}: {_said(error)}") from error
            if tried == retries:
                if isinstance(error, ShortRead):
                    raise
                cause = error.cause if isinstance(error, Passing) else "unreachable"
                raise Unusable(cause, f"{what}: {_said(error)} ({tried + 1} tries)") from error
            wait_s = min(FIRST_WAIT_S * 2**tried, LONGEST_WAIT_S)
            log.warning("%s: %s; try %d of %d in %.3g s", what, _said(error), tried + 2, retries + 1, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable: the last try returns or raises")


class CoolDown:
    """Remembers which shards failed lately, so that a dead server costs its tries once and not for every sample."""

    def __init__(self) -> None:
        self._failed: dict[int, tuple[float, Unusable]] = {}

    def failed(self, shard: int) -> Unusable | None:
        """What was noted for the shard, while that is fresh."""
        until, error = self._failed.get(shard, (0.0, None))
        return error if time.monotonic() < until else None

    def note(self, shard: int, error: Unusable) -> None:
        """A shard failed after all tries."""
        self._failed[shard] = (time.monotonic() + COOL_DOWN_S, error)


class RemoteStore:
    """Shards of any protocol of fsspec, read by byte ranges, several at once.

    Args:
        places: all shards of the set; only the remote ones are ever asked for.
        retries: further tries.
        timeout_s: of one request.
    """

    gap = 512 * 1024  # a request costs as much as some hundred kilobytes

    def __init__(self, places: Sequence[Place], retries: int, timeout_s: float) -> None:
        self._places, self._retries, self._timeout_s = places, retries, timeout_s
        self._files: dict[int, RemoteFile] = {}
        self._ends: dict[int, int] = {}
        self._cool_down = CoolDown()
        self._pool: ThreadPoolExecutor | None = None
        self.bytes_read = 0

    def read(self, spans: Sequence[Span], buffer: NDArray[np.uint8]) -> list[int | Unusable]:
        """See Store."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards")
        # fsspec keeps a connection pool for each thread that opens a file system, so they are opened here.
        for span in spans:
            if span.shard not in self._files:
                self._files[span.shard] = RemoteFile(self._places[span.shard].location, self._timeout_s)
        pieces = [(number, piece) for number, span in enumerate(spans) for piece in _cut(span)]
        answers = self._pool.map(lambda piece: self._read(piece[1], buffer.data), pieces)
        found: list[int | Unusable] = [0] * len(spans)
        for (number, piece), (came, result) in zip(pieces, answers, strict=True):
            self.bytes_read += came
            before = found[number]
            if isinstance(before, Unusable):
                continue
            if isinstance(result, Unusable):
                found[number] = result
            elif before == piece.at - spans[number].at:  # else an earlier piece was short: this one leaves a hole
                found[number] = before + result
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self._places, "retries": self._retries, "timeout_s": self._timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _read(self, span: Span, buffer: memoryview) -> tuple[int, int | Unusable]:
        """Bytes that came over the network, and what is said of the span."""
        failed = self._cool_down.failed(span.shard)
        if failed is not None:
            return 0, failed
        try:
            data, came = self._fetch(span)
        except Unusable as error:
            self._cool_down.note(span.shard, error)
            return 0, error
        buffer[span.at : span.at + len(data)] = data
        return came, len(data)

    def _fetch(self, span: Span) -> tuple[bytes, int]:
        file, location = self._files[span.shard], self._places[span.shard].location
        # A shard that was found to be shorter than the manifest says is not asked beyond its end again.
        size = max(0, min(span.size, self._ends.get(span.shard, span.offset + span.size) - span.offset))
        if size == 0:
            return b"", 0
        try:
            return persistently(lambda: file.piece(span.offset, size), self._retries, location)
        except ShortRead as short:
            self._ends[span.shard] = span.offset + len(short.data)
            return short.data, len(short.data)


def _cut(span: Span) -> list[Span]:
    """A span in requests of bounded size, which go side by side and each have the time limit to themselves."""
    shard, offset, size, at = span
    return [Span(shard, offset + i, min(PIECE, size - i), at + i) for i in range(0, size, PIECE)]


def _is_refused(error: Exception) -> bool:
    """Whether an HTTP server said that it will never answer this request."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING


def _said(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return "no answer in time"
    return str(error) if isinstance(error, Passing) else f"{type(error).__name__}: {error}"
