"""Every sample of a set once, in the order of the set: what scoring and evaluation read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.batch import RawBatch, Request
from dfkd_dist.data.stream.loading import Loader
from dfkd_dist.data.stream.locating import Locator
from dfkd_dist.data.stream.opening import open_reader
from dfkd_dist.data.stream.quarantine import Quarantine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of one shard: the unit of scoring, the same on any number of ranks."""

    start: int
    """Id of the first."""
    count: int


def chunks_of(manifest: Manifest, batch: int) -> list[Chunk]:
    """A set cut into chunks of `batch` samples; the last one of each shard may be shorter."""
    return [
        Chunk(start, min(batch, shard.start + shard.count - start))
        for shard in manifest.shards
        for start in range(shard.start, shard.start + shard.count, batch)
    ]


def scan(
    manifest: Manifest,
    reader: ReaderSpec,
    *,
    batch: int,
    size: int,
    channels: int,
    chunks: Sequence[Chunk],
    quarantine: Quarantine | None = None,
    pin: bool = False,
    places: Callable[[Chunk], NDArray[np.int64]] | None = None,
) -> Iterator[RawBatch]:
    """The images of some chunks, one `RawBatch` for each in turn; `reader.fraction` plays no part.

    Args:
        manifest: the set.
        reader: how it is read.
        batch: no chunk may have more samples.
        size: side of the images in pixels.
        channels: 1 or 3.
        chunks: which, in any order; never across two shards.
        quarantine: lists bad samples; None only counts them.
        pin: images in pinned memory.
        places: which samples of a chunk are wanted, by their places in it; None for all.

    Raises:
        ValueError: a chunk outside the set or larger than `batch`.
        DatasetError: as `open_reader`; later, too large a share of bad samples.
        RuntimeError: later, a reading process died.
    """
    for chunk in chunks:
        if not (0 <= chunk.start and 0 < chunk.count <= batch and chunk.start + chunk.count <= len(manifest)):
            raise ValueError(f"chunks: {chunk}; allowed are 1 to {batch} of the {len(manifest)} samples")
    images = open_reader(manifest, reader, size, channels)
    loader = Loader(images, min(reader.workers, len(chunks)), reader.prefetch, batch, pin)
    requests = _requests(Locator(manifest), chunks, places)
    return _scan(manifest, reader, requests, loader, Quarantine(None) if quarantine is None else quarantine)


def _scan(
    manifest: Manifest, reader: ReaderSpec, requests: Iterator[Request], loader: Loader, quarantine: Quarantine
) -> Iterator[RawBatch]:
    locator = Locator(manifest)
    try:
        for request, outcome in loader.run(requests):
            raw = locator.raw_batch(request, outcome)
            quarantine.add(raw.bad, asked=len(request))
            quarantine.check(reader.bad_limit)
            yield raw
    finally:
        loader.close()


def _requests(
    locator: Locator, chunks: Sequence[Chunk], places: Callable[[Chunk], NDArray[np.int64]] | None
) -> Iterator[Request]:
    for chunk in chunks:
        slots_N = np.arange(chunk.count, dtype=np.int64) if places is None else places(chunk)
        yield locator.request(slots_N + chunk.start, slots_N)
