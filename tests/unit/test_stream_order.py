"""The order of an epoch: every sample once, mixed within windows, the same everywhere; fractions are nested."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dfkd_dist.data.stream.order import epoch_order, subset

STARTS = np.array([0, 7, 19, 24, 33, 43])


def naive(starts: list[int], chosen: set[int], shards: list[int]) -> list[int]:
    """Shard after shard, before anything is mixed."""
    return [i for k in shards for i in range(starts[k], starts[k + 1]) if i in chosen]


@pytest.mark.parametrize("chosen_N", [None, np.arange(43) % 3 > 0])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_an_epoch_is_permuted_shards_mixed_within_windows(chosen_N: NDArray[np.bool_] | None, window: int) -> None:
    order = epoch_order(STARTS, chosen_N, 3, 1, window)
    plain = epoch_order(STARTS, chosen_N, 3, 1, 1)
    shards = list(dict.fromkeys((np.searchsorted(STARTS, plain, side="right") - 1).tolist()))
    chosen = set(range(43)) if chosen_N is None else set(np.flatnonzero(chosen_N).tolist())
    assert plain.tolist() == naive(STARTS.tolist(), chosen, shards)
    for start in range(0, len(order), window):
        assert sorted(order[start : start + window]) == sorted(plain[start : start + window])
    assert window == 1 or order.tolist() != plain.tolist()


def test_shards_without_samples_are_no_matter() -> None:
    starts = np.array([0, 0, 4, 4, 6, 6])
    assert sorted(epoch_order(starts, None, 0, 0, 3)) == list(range(6))
    assert len(epoch_order(starts, np.zeros(6, dtype=np.bool_), 0, 0, 3)) == 0


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first = epoch_order(STARTS, None, 7, 2, 10)
    assert np.array_equal(first, epoch_order(STARTS, None, 7, 2, 10))
    assert not np.array_equal(first, epoch_order(STARTS, None, 7, 3, 10))
    assert not np.array_equal(first, epoch_order(STARTS, None, 8, 2, 10))
    assert np.array_equal(epoch_order(STARTS, None, -(10**30), 2, 10), epoch_order(STARTS, None, -(10**30), 2, 10))


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """Runs that were begun with another version of numpy go on in the same order."""
    assert epoch_order(STARTS, None, 0, 0, 6)[:12].tolist() == GOLDEN
    assert np.flatnonzero(subset(40, 0.25, 0)).tolist() == GOLDEN_SUBSET


GOLDEN = [12, 9, 10, 7, 8, 11, 17, 16, 14, 18, 13, 15]
GOLDEN_SUBSET = [0, 2, 10, 11, 12, 16, 21, 22, 30, 35, 36, 38]


def test_every_place_of_a_window_is_as_likely() -> None:
    places = np.array([np.flatnonzero(epoch_order(np.array([0, 8]), None, 0, e, 8) == 0)[0] for e in range(4000)])
    counts = np.bincount(places, minlength=8)
    # Chi-squared with 7 degrees of freedom: 24.3 is passed once in a thousand.
    assert float(((counts - 500) ** 2 / 500).sum()) < 24.3


def test_fractions_are_nested_and_of_the_right_size() -> None:
    masks = [subset(20_000, fraction, 5) for fraction in (0.1, 0.25, 0.5, 0.999, 1.0)]
    for mask, fraction in zip(masks, (0.1, 0.25, 0.5, 0.999, 1.0), strict=True):
        # Four standard deviations of so many coin tosses.
        assert abs(mask.mean() - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 20_000)
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert not (smaller & ~larger).any()


def test_a_sample_s_own_number_decides_whether_it_takes_part() -> None:
    assert np.array_equal(subset(3_000_000, 0.3, 1)[:1000], subset(1000, 0.3, 1))
    assert not np.array_equal(subset(1000, 0.3, 1), subset(1000, 0.3, 2))
    assert len(subset(0, 0.3, 1)) == 0
