"""Collections of images in shards: all of a set, what a selection chose of it, or what it left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.scan import Chunk, scan
from dfkd_dist.engine.look.collection import Collection, Seen, chosen

IN_PROCESS = 4096
"""So many images are read by this process itself: starting workers would take longer."""


class ShardCollection(Collection):
    """Samples of a set of shards, in the order of the set; unreadable ones are left out.

    Args:
        manifest: the set.
        reader: how it is read; its `fraction` plays no part.
        size: side of the images in pixels.
        channels: 1 or 3.
        name: as in `Collection`.
        ids_N: int64 sample ids, ascending; None takes all.
        left_N: ids of the samples that a selection passed over, where `ids_N` is one.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: ReaderSpec,
        size: int,
        channels: int,
        name: str,
        ids_N: Tensor | None = None,
        left_N: Tensor | None = None,
    ) -> None:
        labelled = manifest.classes is not None and bool((manifest.labels_N >= 0).any())
        super().__init__(name, manifest.classes if labelled else None)
        self.manifest, self.reader, self.size, self.channels = manifest, reader, size, channels
        self.ids_N = torch.arange(len(manifest)) if ids_N is None else ids_N
        self.left_N = left_N

    def __len__(self) -> int:
        return len(self.ids_N)

    def batches(self, batch: int) -> Iterator[Seen]:
        """See Collection."""
        if len(self.ids_N) == 0:
            return
        chunks = chunks_of_ids(self.manifest, self.ids_N, batch)
        reader = self.reader.model_copy(update={"workers": 0}) if len(self.ids_N) <= IN_PROCESS else self.reader
        waiting: list[Seen] = []
        for raw in scan(self.manifest, reader, batch=batch, size=self.size, channels=self.channels, chunks=chunks):
            keep = raw.valid_N
            labels_n = None if self.classes is None else raw.labels_N[keep]
            waiting.append(Seen(raw.images_NCHW[keep], labels_n, raw.ids_N[keep]))
            if sum(len(seen.numbers_N) for seen in waiting) >= batch:
                whole = _joined(waiting)
                yield _cut(whole, 0, batch)
                waiting = [_cut(whole, batch, len(whole.numbers_N))]
        rest = _joined(waiting)
        if len(rest.numbers_N):
            yield rest

    def part(self, count: int, seed: int = 0) -> Collection:
        """See Collection."""
        return self._of(chosen(self.ids_N, count, seed), self.left_N, self.name)

    def rest(self) -> Collection | None:
        """See Collection."""
        return None if self.left_N is None else self._of(self.left_N, None, f"{self.name} (not selected)")

    def _of(self, ids_N: Tensor, left_N: Tensor | None, name: str) -> ShardCollection:
        return ShardCollection(self.manifest, self.reader, self.size, self.channels, name, ids_N, left_N)


def chunks_of_ids(manifest: Manifest, ids_N: Tensor, batch: int) -> list[Chunk]:
    """Ascending ids as runs of consecutive ones, none longer than `batch` and none across two shards."""
    starts = set(manifest.starts().tolist())
    chunks: list[Chunk] = []
    first = last = None
    for sample in [*ids_N.tolist(), None]:
        if first is not None and last is not None:
            goes_on = sample == last + 1 and sample not in starts and sample - first < batch
            if goes_on:
                last = sample
                continue
            chunks.append(Chunk(first, last - first + 1))
        first = last = sample
    return chunks


def _joined(parts: Sequence[Seen]) -> Seen:
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels_N for part in parts if part.labels_N is not None]
    return Seen(
        torch.cat([part.images_NCHW for part in parts]),
        torch.cat(labels) if labels else None,
        torch.cat([part.numbers_N for part in parts]),
    )


def _cut(seen: Seen, start: int, stop: int) -> Seen:
    labels_n = None if seen.labels_N is None else seen.labels_N[start:stop]
    return Seen(seen.images_NCHW[start:stop], labels_n, seen.numbers_N[start:stop])
