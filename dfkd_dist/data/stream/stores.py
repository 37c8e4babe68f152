"""Where the bytes of shards come from: a store reads pieces of shards into one buffer."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.stream.batch import Unusable

_OPEN_FILES = 64


class Span(NamedTuple):
    """A piece of a shard, and where in a buffer it goes."""

    shard: int
    offset: int
    size: int
    at: int


class Place(NamedTuple):
    """One shard: its path, URL or `pipe:` command, and what the manifest says of it."""

    location: str
    bytes: int
    sha256: str


class Store(Protocol):
    """Reads pieces of shards. Can be pickled; what it holds open is opened anew in each process."""

    gap: int
    """Pieces of a shard that lie no farther apart than so many bytes are best read as one."""
    bytes_read: int
    """So far, in this process."""

    def read(self, spans: Sequence[Span], buffer: NDArray[np.uint8]) -> list[int | Unusable]:
        """Read each span to its place in `buffer`; how many bytes there were (fewer where a shard ends), or why not."""
        ...


class LocalStore:
    """Files of this machine (or mounted here), read by offset; a bounded number is kept open.

    Args:
        places: all shards of the set; only the local ones are ever asked for.
    """

    gap = 16 * 1024

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self.bytes_read = 0

    def read(self, spans: Sequence[Span], buffer: NDArray[np.uint8]) -> list[int | Unusable]:
        """See Store."""
        return [self._read(span, buffer.data) for span in spans]

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"_places": self._places}

    def __setstate__(self, state: dict[str, Sequence[Place]]) -> None:
        self.__init__(state["_places"])  # type: ignore[misc]

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self.close()

    def _read(self, span: Span, buffer: memoryview) -> int | Unusable:
        target = buffer[span.at : span.at + span.size]
        try:
            try:
                got = read_fully(self._file(span.shard), target, span.offset)
            except OSError:
                # Handles of a network file system become stale when a server restarts: opened anew, once.
                self._forget(span.shard)
                got = read_fully(self._file(span.shard), target, span.offset)
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            return Unusable("missing", str(error))
        except OSError as error:
            self._forget(span.shard)
            return Unusable("unreachable", f"{self._places[span.shard].location}: {error}")
        self.bytes_read += got
        return got

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        file = os.open(self._places[shard].location.removeprefix("file://"), os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = file
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _forget(self, shard: int) -> None:
        file = self._files.pop(shard, None)
        if file is not None:
            with suppress(OSError):
                os.close(file)


def read_fully(file: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` of an open file; how many bytes there were."""
    got = 0
    while got < len(target):
        step = os.preadv(file, [target[got:]], offset + got)
        if step == 0:
            break
        got += step
    return got
