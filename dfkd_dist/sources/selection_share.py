"""Which samples of a set take part in a selection, and which of them this rank looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.sets import taking_part
from dfkd_dist.data.stream.stream import Chunk, chunks_of
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.topology import bounds

T = TypeVar("T")


class Share:
    """A contiguous run of the set's chunks.

    The list of chunks is a function of the manifest and the size of a chunk alone; the ranks cut it into runs of equal
    length (to within one).

    Args:
        manifest: the set.
        reader: `fraction` says which samples take part.
        batch: samples of a chunk.
        seed: of `fraction`.
        world: the ranks.

    Raises:
        DatasetError: no sample takes part.
    """

    def __init__(self, manifest: Manifest, reader: ReaderSpec, batch: int, seed: int, world: Group) -> None:
        self.manifest, self.reader, self.seed, self.world = manifest, reader, seed, world
        chunks = chunks_of(manifest, batch)
        low, high = bounds(len(chunks), world.size, world.rank)
        self.first = low
        """The number of this rank's first chunk in the list of all."""
        self.chunks: list[Chunk] = chunks[low:high]
        self.steps = -(-len(chunks) // world.size)
        """Chunks of the rank that has most."""
        inside_N = taking_part(manifest, reader.fraction, seed)
        counts = [c.count if inside_N is None else int(inside_N[c.start : c.start + c.count].sum()) for c in chunks]
        self.candidates = sum(counts)
        """Samples that take part, over all ranks."""
        self.largest = max(counts)
        """Of those, samples in the fullest chunk."""
        self.offsets = np.cumsum([0, *counts[low:high]])
        """Where each chunk begins among this rank's candidates, and how many they are."""
        self._start = self.chunks[0].start if self.chunks else 0
        stop = self.chunks[-1].start + self.chunks[-1].count if self.chunks else 0
        self._inside_n = None if inside_N is None else inside_N[self._start : stop].copy()
        if self.candidates == 0:
            raise DatasetError(f"{manifest.path}: source.reader.fraction {reader.fraction} leaves none of its samples")

    def ids(self, chunk: Chunk) -> NDArray[np.int64]:
        """int64, rising: the candidates of one of this rank's chunks."""
        if self._inside_n is None:
            return np.arange(chunk.start, chunk.start + chunk.count, dtype=np.int64)
        start = chunk.start - self._start
        return chunk.start + np.flatnonzero(self._inside_n[start : start + chunk.count])

    def places(self, chunk: Chunk) -> NDArray[np.int64]:
        """int64, rising: where in one of this rank's chunks its candidates are."""
        return self.ids(chunk) - chunk.start

    def own_ids(self) -> NDArray[np.int64]:
        """int64, rising: all candidates of this rank."""
        return np.concatenate([np.zeros(0, np.int64), *(self.ids(chunk) for chunk in self.chunks)])

    def united(self, chosen_n: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[N]` over the whole set, from what each rank chose among its own candidates; the same on all ranks."""
        mask_N = np.zeros(len(self.manifest), bool)
        mask_N[self.own_ids()[chosen_n]] = True
        if self.world.size == 1:
            return mask_N
        # As bits: nobody else sets a bit of this rank's samples, so adding the bytes up is a union.
        bits = torch.from_numpy(np.packbits(mask_N)).to(self.world.device_type)
        return unpacked(self.world.sum_(bits).cpu().numpy(), len(mask_N))

    def check(self, count: int) -> None:
        """Refuse to choose more than there are.

        Raises:
            DatasetError: names the key, what was asked, and what there is.
        """
        if count > self.candidates:
            part = "" if self.reader.fraction == 1 else f" (source.reader.fraction is {self.reader.fraction})"
            raise DatasetError(
                f"source.selection.count is {count}, but {self.manifest.path} offers {self.candidates} samples{part}"
            )


def unpacked(bits: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """The first `count` bits."""
    return np.unpackbits(bits, count=count).astype(bool)


def together(world: Group, act: Callable[[], T]) -> T:
    """Do it on every rank; a failure on one is raised on all, so that none waits for a rank that gave up."""
    value: T | None = None
    own: Exception | None = None
    try:
        value = act()
    except Exception as error:  # it must reach the others, who are waiting
        own = error
    failures = world.gather_objects(None if own is None else str(own))
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise DatasetError(f"rank {rank}: {failure}")
    return value  # type: ignore[return-value]
