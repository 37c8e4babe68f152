"""Deterministic splits of a labelled set: train against held-out, and between private parties.

A shuffle sorts the raw 64-bit output of NumPy's PCG64 under a SeedSequence: integers that NumPy's policy
(NEP 19) keeps stable. `Generator.permutation` and `torch.randperm` may change between versions, and a split
must mean the same images in every version, on every device and after any restart. Each class has its own
stream, so its split does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def stratified_split(strata_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out `fraction` of every stratum (class), rounded to the nearest count.

    Returns int64 positions (kept, held out), each in rising order. Raises ValueError for a fraction outside
    [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected 0 <= fraction < 1, found {fraction}")
    _check_labels(strata_N)
    held = torch.zeros(len(strata_N), dtype=torch.bool)
    for stratum in torch.unique(strata_N).tolist():
        members = _shuffled_members(strata_N, stratum, seed)
        held[members[: int(len(members) * fraction + 0.5)]] = True
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def frequent_classes(num_classes: int, parties: int) -> list[list[int]]:
    """The classes frequent for each party: contiguous blocks, as even as possible, longer ones first.

    Raises ValueError for parties < 1 or more parties than classes.
    """
    if not 1 <= parties <= num_classes:
        raise ValueError(f"parties: expected 1 .. {num_classes} (one class each at least), found {parties}")
    size, longer = divmod(num_classes, parties)
    starts = [party * size + min(party, longer) for party in range(parties + 1)]
    return [list(range(starts[party], starts[party + 1])) for party in range(parties)]


def party_indices(
    labels_N: Tensor,
    *,
    parties: int,
    mode: Literal["bl", "ibl"],
    ratio: float = 1.0,
    seed: int,
    num_classes: int | None = None,
) -> list[Tensor]:
    """Deal a training set to private parties: no overlap, nothing missing (DFMF section 4.1).

    `bl` gives every party an even part of each class. `ibl` gives r / (r + K - 1) of a class to the party for
    which it is frequent and 1 / (r + K - 1) to each other one (r = `ratio`, K = `parties`). Counts are
    rounded by largest remainder; ties go to the party that earlier classes left shortest of its share, so
    that none is favoured.

    Returns int64 positions in rising order for each party. `num_classes` (default: largest label + 1) says
    where the blocks of frequent classes end. Raises ValueError for an unknown mode, ratio < 1, a ratio in
    `bl`, parties < 1, more parties than
    classes in `ibl`, labels outside the classes, or too few images for every party to get one.
    """
    classes = _check_labels(labels_N) if num_classes is None else num_classes
    if _check_labels(labels_N) > classes:
        raise ValueError(f"labels_N: expected 0 .. {classes - 1}, found {int(labels_N.max())}")
    owners = _owners(classes, parties, mode, ratio)
    owed = [Fraction(0)] * parties
    pieces: list[list[Tensor]] = [[] for _ in range(parties)]
    for label, owner in enumerate(owners):
        members = _shuffled_members(labels_N, label, seed)
        counts = _deal(len(members), _shares(parties, owner, ratio), owed)
        for party, piece in enumerate(torch.split(members, counts)):
            pieces[party].append(piece)
    dealt = [torch.cat(piece).sort().values for piece in pieces]
    if any(len(indices) == 0 for indices in dealt):
        raise ValueError(f"parties: {len(labels_N)} images are too few to give each of {parties} parties one")
    return dealt


def _owners(classes: int, parties: int, mode: str, ratio: float) -> list[int | None]:
    """For each class, the party for which it is frequent."""
    if parties < 1:
        raise ValueError(f"parties: expected at least 1, found {parties}")
    if mode == "bl":
        if ratio != 1:
            raise ValueError(f"ratio: mode bl means ratio 1, found {ratio}; mode ibl takes a ratio")
        return [None] * classes
    if mode != "ibl":
        raise ValueError(f"mode: expected bl or ibl, found {mode!r}")
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"ratio: expected a finite number of at least 1, found {ratio}")
    blocks = frequent_classes(classes, parties)
    return [party for party, block in enumerate(blocks) for _ in block]


def _shares(parties: int, owner: int | None, ratio: float) -> list[Fraction]:
    """Each party's exact share of a class; fractions, so that equal remainders really tie."""
    if owner is None:
        return [Fraction(1, parties)] * parties
    rare = 1 / (Fraction(ratio) + parties - 1)
    return [Fraction(ratio) * rare if party == owner else rare for party in range(parties)]


def _deal(count: int, shares: Sequence[Fraction], owed: list[Fraction]) -> list[int]:
    """Whole numbers that sum to `count`, by largest remainder; `owed` carries shortfalls to later classes."""
    exact = [share * count for share in shares]
    counts = [int(value) for value in exact]
    by_claim = sorted(range(len(shares)), key=lambda k: (counts[k] - exact[k], -owed[k], k))
    for party in by_claim[: count - sum(counts)]:
        counts[party] += 1
    for party, value in enumerate(exact):
        owed[party] += value - counts[party]
    return counts


def _shuffled_members(labels_N: Tensor, label: int, seed: int) -> Tensor:
    """Positions of one class in an order that depends on (seed, class, count) only."""
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, found {seed}")
    members = torch.nonzero(labels_N == label).flatten()
    keys = np.random.PCG64(np.random.SeedSequence([seed, label])).random_raw(len(members))
    return members[torch.from_numpy(np.argsort(keys, kind="stable"))]


def _check_labels(labels_N: Tensor) -> int:
    """Smallest number of classes that holds the labels; ValueError if they are no class indices."""
    if labels_N.ndim != 1 or labels_N.is_floating_point() or len(labels_N) == 0 or int(labels_N.min()) < 0:
        found = f"{labels_N.dtype} {tuple(labels_N.shape)}"
        raise ValueError(f"labels: expected integers >= 0 of shape [N], N >= 1, found {found}")
    return int(labels_N.max()) + 1
