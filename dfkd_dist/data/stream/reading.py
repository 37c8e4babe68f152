"""Requests to images: what lies close together is read as one piece, then all of it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.stream.batch import Failure, Outcome, Unusable
from dfkd_dist.data.stream.decoding import Decoder
from dfkd_dist.data.stream.headers import PADDING
from dfkd_dist.data.stream.stores import Span, Store

_AT_ONCE = 64 * 2**20
"""Bytes of encoded images in memory at a time, unless a single piece is larger."""


class ImageReader:
    """Reads and decodes requests; works in any process that it is sent to.

    Args:
        stores: for each shard, which store has it.
        store_of_S: int64 `[shards]`, an index into `stores`.
        decoder: to images.
    """

    preload: Sequence[str] = ()

    def __init__(self, stores: Sequence[Store], store_of_S: NDArray[np.int64], decoder: Decoder) -> None:
        self._stores, self._store_of_S, self._decoder = stores, store_of_S, decoder
        self.size, self.channels = decoder.size, decoder.channels
        self._buffer = np.zeros(0, dtype=np.uint8)

    def read(self, pieces_3N: NDArray[np.int64], out_NCHW: Tensor | None = None) -> Outcome:
        """The images of a `Request`, in `out_NCHW` if given; a sample that cannot be used is zero and listed."""
        before = sum(store.bytes_read for store in self._stores)
        images = self._decoder.blanks(pieces_3N.shape[1])
        failures: list[Failure] = []
        with torch.inference_mode():  # a fifteenth faster at 32 px; what `join` returns is an ordinary tensor
            for store in range(len(self._stores)):
                mine_n = np.flatnonzero(self._store_of_S[pieces_3N[0]] == store)
                for members_n in _portions(pieces_3N, mine_n):
                    self._read_portion(self._stores[store], members_n, pieces_3N[:, members_n], images, failures)
        failures.sort()
        read = sum(store.bytes_read for store in self._stores) - before
        return Outcome(self._decoder.join(images, out_NCHW), failures, read)

    def _read_portion(
        self,
        store: Store,
        members_n: NDArray[np.int64],
        pieces_3n: NDArray[np.int64],
        images: list[Tensor],
        failures: list[Failure],
    ) -> None:
        shards_n, offsets_n, sizes_n = pieces_3n
        spans, span_n, starts_n = plan(shards_n, offsets_n, sizes_n, store.gap)
        stops_n = starts_n + sizes_n
        buffer = self._room(spans[-1].at + spans[-1].size)
        results = store.read(spans, buffer)
        ends_S = np.array(
            [span.at + (0 if isinstance(got, Unusable) else got) for span, got in zip(spans, results, strict=True)]
        )
        whole_n = stops_n <= ends_S[span_n]
        for member in np.flatnonzero(~whole_n):
            failures.append(_unread(int(members_n[member]), results[span_n[member]], spans[span_n[member]]))
        if not whole_n.all():
            members_n, starts_n, stops_n = members_n[whole_n], starts_n[whole_n], stops_n[whole_n]
        self._decoder.decode(buffer, starts_n, stops_n, members_n, images, failures)

    def _room(self, size: int) -> NDArray[np.uint8]:
        """A buffer that is used again and again, with room behind for looking ahead."""
        if len(self._buffer) < size + PADDING:
            self._buffer = np.zeros(size + size // 4 + PADDING, dtype=np.uint8)
        return self._buffer


def _portions(pieces_3N: NDArray[np.int64], members_n: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Positions in the order in which they lie in the shards, cut so that memory stays bounded."""
    shards_N, offsets_N, sizes_N = pieces_3N
    members_n = members_n[np.lexsort((offsets_N[members_n], shards_N[members_n]))]
    ends_n = np.cumsum(sizes_N[members_n])
    start = 0
    while start < len(members_n):
        before = ends_n[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends_n, before + _AT_ONCE, side="right")))
        yield members_n[start:stop]
        start = stop


def plan(
    shards_n: NDArray[np.int64], offsets_n: NDArray[np.int64], sizes_n: NDArray[np.int64], gap: int
) -> tuple[list[Span], NDArray[np.int64], NDArray[np.int64]]:
    """Few pieces for many samples, which are in order of (shard, offset).

    Returns the pieces, laid one after another in a buffer; for each sample its piece, and where it begins there.
    """
    ends_n = offsets_n + sizes_n
    new_n = np.ones(len(shards_n), dtype=np.bool_)
    new_n[1:] = (shards_n[1:] != shards_n[:-1]) | (offsets_n[1:] - ends_n[:-1] > gap)
    firsts_G = np.flatnonzero(new_n)
    span_n = np.cumsum(new_n) - 1
    lows_G = offsets_n[firsts_G]
    highs_G = np.maximum.reduceat(ends_n, firsts_G)
    ats_G = np.concatenate([[0], np.cumsum(highs_G - lows_G)[:-1]])
    starts_n = ats_G[span_n] + offsets_n - lows_G[span_n]
    numbers = (shards_n[firsts_G], lows_G, highs_G - lows_G, ats_G)
    spans = [Span(*four) for four in zip(*(array.tolist() for array in numbers), strict=True)]
    return spans, span_n, starts_n


def _unread(position: int, result: int | Unusable, span: Span) -> Failure:
    if isinstance(result, Unusable):
        return Failure(position, result.cause, result.detail)
    return Failure(position, "truncated", f"the shard ends at byte {span.offset + result}")
