"""Shards that are copied to the disk cache as wholes before they are read: `pipe:` commands, remote ones if wished."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.stream import remote
from dfkd_dist.data.stream.batch import Passing, Unusable
from dfkd_dist.data.stream.cache import DiskCache, Write
from dfkd_dist.data.stream.remote import CoolDown, RemoteFile, ShortRead, persistently
from dfkd_dist.data.stream.stores import Place, Span, read_fully

PIPE = "pipe:"


class CopyStore:
    """Shards read from copies in a disk cache.

    Args:
        places: all shards of the set.
        cache: where copies are kept.
        retries: further tries of a piece, or of a whole command.
        timeout_s: of a request; how long a command may be silent.
    """

    gap = 16 * 1024

    def __init__(self, places: Sequence[Place], cache: DiskCache, retries: int, timeout_s: float) -> None:
        self._places, self._cache, self._retries, self._timeout_s = places, cache, retries, timeout_s
        self._cool_down = CoolDown()
        self.bytes_read = 0

    def read(self, spans: Sequence[Span], buffer: NDArray[np.uint8]) -> list[int | Unusable]:
        """See Store."""
        found: list[int | Unusable] = []
        for shard, group in groupby(spans, key=lambda span: span.shard):
            found += self._read_shard(shard, list(group), buffer.data)
        return found

    def __getstate__(self) -> dict[str, Any]:
        names = ("places", "cache", "retries", "timeout_s")
        return {name: getattr(self, f"_{name}") for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _read_shard(self, shard: int, spans: list[Span], buffer: memoryview) -> list[int | Unusable]:
        failed = self._cool_down.failed(shard)
        if failed is not None:
            return [failed] * len(spans)
        place = self._places[shard]

        def whole() -> list[int | Unusable]:
            with self._cache.open(place.sha256, place.bytes, lambda write: self._fetch(place, write)) as file:
                return [read_fully(file, buffer[span.at : span.at + span.size], span.offset) for span in spans]

        try:
            # Pieces of a download are tried again by themselves; as a whole it is only if its checksum is wrong.
            tries = self._retries if place.location.startswith(PIPE) else min(1, self._retries)
            return persistently(whole, tries, place.location)
        except Unusable as error:
            self._cool_down.note(shard, error)
            return [error] * len(spans)

    def _fetch(self, place: Place, write: Write) -> None:
        """Bring a whole shard."""
        pieces = self._run(place) if place.location.startswith(PIPE) else self._download(place)
        with closing(pieces):
            for piece in pieces:
                self.bytes_read += len(piece)
                write(piece)

    def _download(self, place: Place) -> Generator[bytes]:
        """In pieces, each of which may fail and be asked for again."""
        file = RemoteFile(place.location, self._timeout_s)
        offset = 0
        while offset < place.bytes:
            size = min(remote.PIECE, place.bytes - offset)
            rest = functools.partial(file.rest, offset, size)
            try:
                data = persistently(rest, self._retries, place.location)
            except ShortRead as short:
                yield short.data
                return  # the checksum tells
            yield data
            offset += len(data)

    def _run(self, place: Place) -> Generator[bytes]:
        """A command's output."""
        with _shell(place.location.removeprefix(PIPE)) as process:
            assert process.stdout is not None
            while True:
                if not select.select([process.stdout], [], [], self._timeout_s)[0]:
                    raise Passing("unreachable", f"silent for {self._timeout_s:g} s")
                data = os.read(process.stdout.fileno(), remote.PIECE)
                if not data:
                    break
                yield data
            if process.wait() != 0:
                raise Passing("unreachable", f"ended with exit code {process.returncode}")


@contextmanager
def _shell(command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, so that all of its processes can be ended."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
