"""What a stream hands out: one rank's slots of a global batch, and the samples that could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CAUSES = {
    "missing": "the shard is not there, or may not be read",
    "unreachable": "a remote shard could not be read after all tries",
    "checksum": "a shard that was copied is not the one of the manifest",
    "truncated": "the shard ends before the image does",
    "not_an_image": "neither a jpg nor a png nor a webp file",
    "gif": "gif files are not read",
    "animated": "a png or webp file with several frames",
    "cmyk": "a jpg of four inks, whose colours are not known without a profile",
    "too_many_pixels": "more pixels than reader.pixel_limit",
    "corrupt": "the decoder refuses it",
}
"""Why a sample cannot be used; `not_an_image`, `gif`, ... `corrupt` are the file's own fault."""


class Unusable(Exception):
    """A sample, or a whole piece of a shard, cannot be used; never stops a run by itself."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


class Passing(Exception):
    """Reading failed in a way that may not happen again: tried again some times, then `Unusable` of the same cause."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


class Failure(NamedTuple):
    """Where in a request a sample could not be used, and why."""

    position: int
    cause: str
    detail: str


@dataclass(frozen=True)
class Bad:
    """One sample that could not be used; its slot is masked."""

    id: int
    shard: str
    index: int
    """Its place in the shard."""
    cause: str
    """A key of `CAUSES`."""
    detail: str


@dataclass(frozen=True)
class Request:
    """Which samples are wanted, and where they lie: n entries each, int64."""

    ids_N: NDArray[np.int64]
    slots_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    pieces_3N: NDArray[np.int64]
    """Shard, offset and size of each: all that reading needs."""

    def __len__(self) -> int:
        return len(self.ids_N)


class Outcome(NamedTuple):
    """What reading made of a request."""

    images_NCHW: Tensor
    """uint8, channels last in memory; zeros where unusable."""
    failures: list[Failure]
    bytes_read: int
    """From wherever the shards lie; a shard that is in the cache already costs nothing."""


class Reader(Protocol):
    """Turns requests into images, in any process that it is sent to."""

    size: int
    channels: int

    @property
    def preload(self) -> Sequence[str]:
        """Modules that reading processes import before they are forked, if they can."""
        ...

    def read(self, pieces_3N: NDArray[np.int64], out_NCHW: Tensor | None = None) -> Outcome:
        """The images of a `Request`, in `out_NCHW` if given; a sample that cannot be used is zero and listed."""
        ...


@dataclass(frozen=True)
class RawBatch:
    """One rank's n slots of a global batch.

    Args:
        images_NCHW: uint8 `[n, C, S, S]`, zeros where not valid; channels last in memory, as decoders write them.
        valid_N: bool.
        slots_N: int64, the position of each within the global batch (of a scan: within the chunk).
        ids_N: int64 sample ids.
        labels_N: int64, -1 where unknown.
        bad: the samples that are not valid, and why.
    """

    images_NCHW: Tensor
    valid_N: Tensor
    slots_N: Tensor
    ids_N: Tensor
    labels_N: Tensor
    bad: tuple[Bad, ...]
