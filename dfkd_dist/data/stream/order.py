"""The order of an epoch: a function of the set, the choice, the seed and the epoch, and of nothing else.

Raw Philox words (Salmon et al., SC 2011) are sorted as keys, rather than numpy's own shuffle called, because numpy
promises the former to stay the same from version to version, and not the latter.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2**20


def subset(count: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of `count` samples belong to a fraction of them.

    Each sample has a uniform of its own, from (seed, its number); it belongs if that is below `fraction`. So a smaller
    fraction lies within a larger one, and the number of samples is that of so many coin tosses.
    """
    if fraction >= 1:
        return np.ones(count, dtype=np.bool_)
    source = _philox(seed, "subset", 0)
    # Compared as integers: 2^64 x fraction is exact in a Python int, which a float64 uniform would not be.
    limit = np.uint64(int(fraction * 2**64))
    return np.concatenate(
        [source.random_raw(min(_CHUNK, count - start)) < limit for start in range(0, count, _CHUNK)]
        or [np.zeros(0, dtype=np.bool_)]
    )


def epoch_order(
    starts: NDArray[np.int64], chosen_N: NDArray[np.bool_] | None, seed: int, epoch: int, window: int
) -> NDArray[np.int64]:
    """The sample ids of an epoch in order, int64.

    Shards come in a random order, then samples are shuffled within each run of `window` of them.

    Args:
        starts: `[shards + 1]`, ids at which shards begin, and the end.
        chosen_N: which samples take part; None for all.
        seed: of the run.
        epoch: from 0.
        window: how many samples are mixed.
    """
    source = _philox(seed, "order", epoch)
    counts = np.diff(starts)
    shards = np.argsort(source.random_raw(len(counts)), kind="stable")
    ends = np.cumsum(counts[shards])
    # Within its shard a sample's id is its place in the epoch plus a constant of the shard.
    ids_N = np.arange(starts[-1], dtype=np.int64) + np.repeat(
        starts[:-1][shards] - (ends - counts[shards]), counts[shards]
    )
    if chosen_N is not None:
        ids_N = ids_N[chosen_N[ids_N]]
    for start in range(0, len(ids_N), window):
        block = ids_N[start : start + window]
        block[:] = block[np.argsort(source.random_raw(len(block)), kind="stable")]
    return ids_N


def _philox(seed: int, purpose: str, epoch: int) -> np.random.Philox:
    """A generator of its own for each purpose and epoch, from a seed of any size and sign."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))
