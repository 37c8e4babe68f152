"""The images that an inversion run made and kept, as a collection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfkd_dist.data.pool import Pool
from dfkd_dist.engine.look.collection import Collection, Seen, chosen


class PoolCollection(Collection):
    """Images of a run's pool, with the labels that they were to have.

    Args:
        pool: the run's.
        classes: names of the labels.
        name: as in `Collection`.
        ids_N: int64 numbers of images, ascending; None takes all.
    """

    def __init__(self, pool: Pool, classes: Sequence[str], name: str, ids_N: Tensor | None = None) -> None:
        super().__init__(name, classes)
        self.pool = pool
        self.ids_N = torch.arange(len(pool)) if ids_N is None else ids_N

    def __len__(self) -> int:
        return len(self.ids_N)

    def batches(self, batch: int) -> Iterator[Seen]:
        """See Collection."""
        for ids_n in self.ids_N.split(batch):
            made = self.pool.read(ids_n)
            yield Seen(made.images_NCHW, made.labels_N.cpu(), ids_n)

    def part(self, count: int, seed: int = 0) -> Collection:
        """See Collection."""
        assert self.classes is not None
        return PoolCollection(self.pool, self.classes, self.name, chosen(self.ids_N, count, seed))
