"""Sample ids to requests, and what was read for them to batches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.batch import Bad, Outcome, RawBatch, Request


class Locator:
    """Turns sample ids into requests: the manifest's numbers, looked up without a loop.

    Args:
        manifest: the set.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = manifest.starts()

    def request(self, ids_N: NDArray[np.int64], slots_N: NDArray[np.int64]) -> Request:
        """Where these samples lie."""
        manifest = self.manifest
        shards_N = np.searchsorted(self._starts, ids_N, side="right") - 1
        pieces_3N = np.stack([shards_N, manifest.offsets_N[ids_N], manifest.sizes_N[ids_N]])
        return Request(ids_N, slots_N, manifest.labels_N[ids_N], pieces_3N)

    def raw_batch(self, request: Request, outcome: Outcome) -> RawBatch:
        """A request and what was read for it."""
        valid_N = torch.ones(len(request), dtype=torch.bool)
        bad = []
        for position, cause, detail in outcome.failures:
            valid_N[position] = False
            sample, shard = int(request.ids_N[position]), int(request.pieces_3N[0, position])
            index = sample - int(self._starts[shard])
            bad.append(Bad(sample, self.manifest.shards[shard].name, index, cause, detail))
        numbers = (torch.from_numpy(array) for array in (request.slots_N, request.ids_N, request.labels_N))
        slots_N, ids_N, labels_N = numbers
        return RawBatch(outcome.images_NCHW, valid_N, slots_N, ids_N, labels_N, tuple(bad))
