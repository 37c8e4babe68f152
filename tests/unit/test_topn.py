"""Radix selection over ranks against one full sort: ties, infinities, both zeros, classes, any way of dealing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.topn import ordered_uint32, quotas, top_n, top_n_balanced


class FakeGroup:
    """Ranks as threads of one process: a sum is what all of them put on the table."""

    device_type = "cpu"

    def __init__(self, size: int) -> None:
        self.size, self.table = size, [torch.zeros(0)] * size
        self.barrier, self.calls = threading.Barrier(size, timeout=20), 0
        self.own = threading.local()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.int64  # counts travel, no scores
        self.table[self.own.rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(self.table).sum(dim=0)
        self.calls += self.own.rank == 0
        self.barrier.wait()
        return tensor.copy_(total)


def on_ranks(size: int, act: Callable[[int, Group], Any]) -> list[Any]:
    """What each rank returned or raised."""
    group: Any = FakeGroup(size) if size > 1 else ALONE
    said: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        if size > 1:
            group.own.rank = rank
        try:
            said[rank] = act(rank, group)
        except ValueError as error:
            said[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def sorted_choice(scores_n: NDArray[np.float32], ids_n: NDArray[np.int64], count: int, largest: bool) -> set[int]:
    """Ids of the N best by a full sort, in Python numbers (torch may have told numpy to flush denormals)."""
    bits_n = scores_n.view(np.uint32).tolist()
    magnitudes = [(bits & 0x7FFFFFFF) * (-1 if bits >> 31 else 1) for bits in bits_n]
    pairs = sorted((-m if largest else m, int(i)) for m, i in zip(magnitudes, ids_n, strict=True))
    return {i for _, i in pairs[:count]}


def chosen(
    scores_n: NDArray[np.float32], ids_n: NDArray[np.int64], owner_n: NDArray[np.int64], size: int, **how: Any
) -> set[int]:
    """Ids that the ranks choose together."""
    masks = on_ranks(size, lambda r, g: top_n(scores_n[owner_n == r], ids_n[owner_n == r], group=g, **how))
    return {int(i) for r, mask in enumerate(masks) for i in ids_n[owner_n == r][mask]}


INF, SIGN = 0x7F800000, 1 << 31
SPECIAL = [0, SIGN, 1, SIGN | 1, INF, SIGN | INF, INF - 1, SIGN | (INF - 1), 0x3F800000, 0x3F800001, SIGN | 0x3F800000]
"""Bits of 0, -0, the smallest denormals, the infinities, the largest numbers, 1, its neighbour, and -1."""


@st.composite
def dealt(draw: Any) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], int]:
    n = draw(st.integers(0, 60))
    anything = st.builds(lambda magnitude, sign: magnitude | sign, st.integers(0, INF), st.sampled_from([0, SIGN]))
    bits = draw(st.lists(st.one_of(st.sampled_from(SPECIAL), anything), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=n, max_size=n, unique=True))
    size = draw(st.sampled_from([1, 2, 3, 4]))
    owners = draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n))
    scores = np.array(bits, np.uint32).view(np.float32)
    return scores, np.array(ids, np.int64), np.array(owners, np.int64), size


@settings(max_examples=150, deadline=None)
@given(dealt(), st.integers(0, 70), st.booleans())
def test_equals_a_full_sort(case: Any, count: int, largest: bool) -> None:
    scores_n, ids_n, owner_n, size = case
    found = chosen(scores_n, ids_n, owner_n, size, count=count, largest=largest)
    assert found == sorted_choice(scores_n, ids_n, count, largest)


@settings(max_examples=80, deadline=None)
@given(dealt(), st.integers(0, 70), st.integers(1, 6), st.booleans(), st.integers(0, 9))
def test_balanced_is_a_full_sort_of_each_class(case: Any, count: int, classes: int, largest: bool, shift: int) -> None:
    scores_n, ids_n, owner_n, size = case
    labels_n = (ids_n * 7 + shift) % classes
    masks = on_ranks(
        size,
        lambda r, g: top_n_balanced(
            *(part[owner_n == r] for part in (scores_n, ids_n, labels_n)), count, classes, g, largest=largest
        ),
    )
    found = {int(i) for r, mask in enumerate(masks) for i in ids_n[owner_n == r][mask]}
    quota_C = quotas(np.bincount(labels_n, minlength=classes), count)
    wanted: set[int] = set()
    for c in range(classes):
        own = labels_n == c
        wanted |= sorted_choice(scores_n[own], ids_n[own], int(quota_C[c]), largest)
    assert found == wanted


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 200))
def test_quotas_are_even(available: list[int], count: int) -> None:
    quota_C = quotas(np.array(available), count)
    assert quota_C.sum() == min(count, sum(available))
    assert (quota_C <= available).all()
    unfilled = quota_C[quota_C < np.array(available)]
    if len(unfilled):  # who has more to give gives the most, to within one, and the first give the one more
        assert unfilled.max() - unfilled.min() <= 1
        assert list(unfilled) == sorted(unfilled, reverse=True)
        assert quota_C.max() <= unfilled.min() + 1


def test_quotas_by_hand() -> None:
    assert quotas(np.array([2, 10, 10]), 12).tolist() == [2, 5, 5]
    assert quotas(np.array([2, 10, 10]), 13).tolist() == [2, 6, 5]
    assert quotas(np.array([0, 3, 1]), 9).tolist() == [0, 3, 1]
    assert quotas(np.array([5, 5]), 0).tolist() == [0, 0]


def test_many_blocks_heavily_tied() -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    n = 200_000  # several blocks of the inner loop
    scores_n = generator.choice(np.array([0.0, -0.0, 0.25, 0.5, np.inf], np.float32), n)
    ids_n = generator.permutation(np.arange(n, dtype=np.int64)) * 11
    owner_n = generator.integers(0, 3, n)
    for count in (1, 70_001, n - 1, n, n + 5):
        assert chosen(scores_n, ids_n, owner_n, 3, count=count, largest=False) == sorted_choice(
            scores_n, ids_n, count, False
        )


def test_order_of_the_integers() -> None:
    bits = [SIGN | INF, SIGN | 0x40400000, SIGN | 1, SIGN, 0, 1, 0x40000000, INF]  # -inf, -3, ..., 2, inf
    keys = ordered_uint32(np.array(bits, np.uint32).view(np.float32)).tolist()
    assert keys[3] == keys[4]
    assert keys == sorted(keys) and len(set(keys)) == 7


def test_what_is_refused_is_refused_on_all_ranks() -> None:
    def with_scores(bad: float) -> Callable[[int, Group], Any]:
        return lambda r, g: top_n(
            np.array([1.0, bad if r == 1 else 2.0], np.float32), np.array([2 * r, 2 * r + 1]), 2, g, largest=True
        )

    for said in on_ranks(3, with_scores(float("nan"))):
        assert isinstance(said, ValueError) and "1 scores are NaN" in str(said)
    same_ids = on_ranks(2, lambda r, g: top_n(np.ones(2, np.float32), np.array([r, 7]), 3, g, largest=True))
    for said in same_ids:
        assert isinstance(said, ValueError) and "same id" in str(said)
    outside = on_ranks(2, lambda r, g: top_n(np.ones(1, np.float32), np.array([r * 2**32]), 1, g, largest=True))
    for said in outside:
        assert isinstance(said, ValueError) and "outside [0, 2^32)" in str(said)
    labels = on_ranks(
        2,
        lambda r, g: top_n_balanced(np.ones(1, np.float32), np.array([r]), np.array([3 * r]), 1, 3, g, largest=True),
    )
    for said in labels:
        assert isinstance(said, ValueError) and "outside [0, 3)" in str(said)
    with pytest.raises(ValueError, match="float32 scores"):
        top_n(np.ones(2), np.arange(2), 1, ALONE, largest=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count >= 0"):
        top_n(np.ones(2, np.float32), np.arange(2), -1, ALONE, largest=True)
