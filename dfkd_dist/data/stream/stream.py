"""Global batches of real images in an order that does not depend on the number of ranks that share them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.batch import Bad, Outcome, RawBatch, Request
from dfkd_dist.data.stream.loading import Loader
from dfkd_dist.data.stream.locating import Locator
from dfkd_dist.data.stream.opening import open_reader
from dfkd_dist.data.stream.order import epoch_order
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.data.stream.scan import Chunk, chunks_of, scan
from dfkd_dist.data.stream.sets import taking_part

__all__ = ["Bad", "Chunk", "Quarantine", "RawBatch", "Stream", "Traffic", "chunks_of", "scan"]

log = logging.getLogger(__name__)


class Traffic(NamedTuple):
    """Bytes that were read from where the shards lie, and bytes of images among them that were asked for."""

    read: int
    used: int

    @property
    def amplification(self) -> float:
        """How many bytes are read for each that is used; below 1 where a cache is warm."""
        return self.read / self.used if self.used else 0.0


class Stream:
    """One rank's view of endless epochs over a set of shards.

    Global batch g of an epoch is positions g x batch .. (g + 1) x batch - 1 of its order; a rank has the slice of them
    that `parallel.topology.bounds` gives it. There is no state: `get(epoch, g)` is the same at any time, on any number
    of ranks. What does not fill a batch at an epoch's end is left out, and logged.

    Args:
        manifest: the set.
        reader: how it is read; `fraction` of it takes part.
        batch: samples of a global batch.
        size: side of the images in pixels.
        channels: 1 or 3.
        seed: of the order and of the fraction.
        rank: of this process among those that share a batch.
        world_size: how many they are.
        quarantine: lists bad samples; None only counts them.
        shuffle: False reads in the order of the set.
        pin: images in pinned memory.

    Raises:
        DatasetError: fewer samples than one batch; and as `open_reader`.
        ImportError: a protocol's package is missing.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: ReaderSpec,
        *,
        batch: int,
        size: int,
        channels: int,
        seed: int,
        rank: int,
        world_size: int,
        quarantine: Quarantine | None = None,
        shuffle: bool = True,
        pin: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: found {rank}, allowed are 0 to {world_size - 1}")
        self.manifest, self.reader, self.batch, self.seed, self.shuffle = manifest, reader, batch, seed, shuffle
        self.quarantine = Quarantine(None, rank) if quarantine is None else quarantine
        self.traffic = Traffic(0, 0)
        """Of this rank, since the start."""
        self.batches = 0
        """Whole global batches of an epoch under the present choice."""
        # As parallel.topology.bounds, which this floor may not import.
        self._low, self._high = batch * rank // world_size, batch * (rank + 1) // world_size
        self._locator = Locator(manifest)
        self._part_N = taking_part(manifest, reader.fraction, seed)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._coming: Iterator[tuple[Request, Outcome]] | None = None
        self._next = (-1, -1)
        self._take(self._part_N)
        if self.batches == 0:
            found = f"{self._count} of the {len(manifest)} samples take part (reader.fraction {reader.fraction:g})"
            raise DatasetError(f"{manifest.path}: {found}, fewer than one batch of {batch}")
        images = open_reader(manifest, reader, size, channels)
        self._loader = Loader(images, reader.workers, reader.prefetch, self._high - self._low, pin)

    def choose(self, chosen_N: NDArray[np.bool_] | None) -> None:
        """Which samples an epoch holds, among those of `reader.fraction`; None for all of these.

        Fewer samples than a batch leave `batches` at 0.

        Raises:
            ValueError: a mask of another shape or type.
            DatasetError: it asks for samples that a compiled file does not hold.
        """
        if chosen_N is not None and (chosen_N.dtype != np.bool_ or chosen_N.shape != (len(self.manifest),)):
            found = f"{chosen_N.dtype} {chosen_N.shape}"
            raise ValueError(f"chosen_N: found {found}; expected bool ({len(self.manifest)},)")
        held_N = self.manifest.held_N
        if chosen_N is not None and held_N is not None and (lost := int(np.count_nonzero(chosen_N & ~held_N))):
            raise DatasetError(f"{self.manifest.path}: was compiled without {lost} of the samples that are selected")
        parts = [mask_N for mask_N in (self._part_N, chosen_N) if mask_N is not None]
        self._take(np.logical_and.reduce(parts) if parts else None)

    def get(self, epoch: int, g: int) -> RawBatch:
        """This rank's slots of global batch `g`. What follows is read ahead; any other batch next is a seek.

        Raises:
            ValueError: there is no such batch.
            DatasetError: too large a share of samples could not be used.
            RuntimeError: a reading process died.
        """
        if not (0 <= epoch and 0 <= g < self.batches):
            raise ValueError(f"epoch {epoch}, batch {g}: epochs have {self.batches} batches of {self.batch}")
        if self._coming is None or self._next != (epoch, g):
            self._coming = self._loader.run(self._requests(epoch, g))
        try:
            request, outcome = next(self._coming)
        except BaseException:
            self._coming = None
            raise
        self._next = self._after(epoch, g)
        self.traffic = Traffic(
            self.traffic.read + outcome.bytes_read, self.traffic.used + int(request.pieces_3N[2].sum())
        )
        raw = self._locator.raw_batch(request, outcome)
        self.quarantine.add(raw.bad, asked=len(request))
        self.quarantine.check(self.reader.bad_limit)
        return raw

    def close(self) -> None:
        """End the reading processes and say what was read; `get` fails afterwards."""
        self._coming = None
        self._loader.close()
        if self.traffic.used:
            read, used, factor = self.traffic.read / 1e9, self.traffic.used / 1e9, self.traffic.amplification
            log.info("read %.3g GB from shards for %.3g GB of images: amplification %.3g", read, used, factor)

    def _take(self, mask_N: NDArray[np.bool_] | None) -> None:
        self._mask_N = mask_N
        self._count = len(self.manifest) if mask_N is None else int(np.count_nonzero(mask_N))
        self.batches, left = divmod(self._count, self.batch)
        self._orders.clear()
        self._coming = None  # what was read ahead belongs to the old choice
        if left:
            log.info(
                "%d of %d samples do not fill a batch of %d: each epoch leaves out that many",
                left,
                self._count,
                self.batch,
            )

    def _requests(self, epoch: int, g: int) -> Iterator[Request]:
        """From a batch on, without end."""
        slots_N = np.arange(self._low, self._high, dtype=np.int64)
        while True:
            yield self._locator.request(self._order(epoch)[g * self.batch + slots_N], slots_N)
            epoch, g = self._after(epoch, g)

    def _after(self, epoch: int, g: int) -> tuple[int, int]:
        return (epoch, g + 1) if g + 1 < self.batches else (epoch + 1, 0)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Ids in the order of an epoch; kept for as long as reading is in it."""
        if epoch not in self._orders:
            self._orders = {epoch: self._ordered(epoch)}
        return self._orders[epoch]

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        if self.shuffle:
            return epoch_order(self.manifest.starts(), self._mask_N, self.seed, epoch, self.reader.window)
        return np.arange(self._count, dtype=np.int64) if self._mask_N is None else np.flatnonzero(self._mask_N)
