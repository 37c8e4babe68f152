"""Which rank holds which teacher: arithmetic over integers, for every small world."""

from __future__ import annotations

import random

import pytest

from dfkd_dist.parallel.topology import bounds, make_topology, pack, share

WORLDS = [(world, count) for world in range(1, 17) for count in range(1, 8)]


@pytest.mark.parametrize(("world", "count"), WORLDS)
def test_rows_are_the_largest_divisor_that_the_teachers_can_fill(world: int, count: int) -> None:
    topology = make_topology(world, [1.0] * count)
    expected = max(d for d in range(1, world + 1) if world % d == 0 and d <= count)
    assert (topology.rows, topology.columns) == (expected, world // expected)
    assert topology.world_size == world


@pytest.mark.parametrize(("world", "count"), WORLDS)
@pytest.mark.parametrize("kind", ["equal", "random", "zero", "one heavy"])
def test_every_teacher_has_one_home_and_no_row_is_empty(world: int, count: int, kind: str) -> None:
    rng = random.Random(world * 100 + count)
    costs = {
        "equal": [1.0] * count,
        "random": [rng.uniform(0, 10) for _ in range(count)],
        "zero": [0.0] * count,
        "one heavy": [1e9] + [0.0] * (count - 1),
    }[kind]
    topology = make_topology(world, costs)
    assert sorted(k for row in topology.teachers for k in row) == list(range(count))
    assert all(row for row in topology.teachers)
    assert all(list(row) == sorted(row) for row in topology.teachers)


@pytest.mark.parametrize(("world", "count"), WORLDS)
def test_rows_and_columns_are_a_grid(world: int, count: int) -> None:
    topology = make_topology(world, [1.0] * count)
    for rank in range(world):
        row, column = topology.row_of(rank), topology.column_of(rank)
        assert topology.row_ranks(row)[column] == rank == topology.column_ranks(column)[row]
    assert sorted(r for t in range(topology.rows) for r in topology.row_ranks(t)) == list(range(world))
    assert sorted(r for c in range(topology.columns) for r in topology.column_ranks(c)) == list(range(world))


def test_the_design_example() -> None:
    topology = make_topology(4, [1.0, 1.0, 1.0])
    assert (topology.rows, topology.columns) == (2, 2)
    assert sorted(len(row) for row in topology.teachers) == [1, 2]


def test_no_teachers_is_one_row() -> None:
    assert make_topology(6, []).teachers == ((),)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_given_rows(rows: int) -> None:
    assert make_topology(6, [1.0] * 6, rows).rows == rows


def test_rows_that_do_not_divide_are_an_error_that_says_what_does() -> None:
    with pytest.raises(ValueError, match=r"mesh\.rows is 4.*6 ranks.*\[1, 2, 3, 6\]"):
        make_topology(6, [1.0] * 6, 4)


def test_more_rows_than_teachers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"mesh\.rows is 3.*2 teachers"):
        make_topology(6, [1.0, 1.0], 3)


def test_packing_balances_costs() -> None:
    costs = [7.0, 1.0, 3.0, 4.0, 1.0]
    loads = [sum(costs[k] for k in row) for row in pack(costs, 2)]
    assert sorted(loads) == [8.0, 8.0]


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_within_the_bound_of_its_rule(seed: int) -> None:
    """Longest processing time first stays within 4/3 - 1/(3m) of the optimum (Graham 1969)."""
    rng = random.Random(seed)
    costs, rows = [rng.uniform(0.1, 10) for _ in range(8)], 3
    worst = max(sum(costs[k] for k in row) for row in pack(costs, rows))
    best = min(_heaviest(costs, rows, code) for code in range(rows ** len(costs)))
    assert best <= worst + 1e-12 and worst <= (4 / 3 - 1 / (3 * rows)) * best + 1e-12


def _heaviest(costs: list[float], rows: int, code: int) -> float:
    loads = [0.0] * rows
    for cost in costs:
        code, row = divmod(code, rows)
        loads[row] += cost
    return max(loads)


def test_packing_does_not_depend_on_chance() -> None:
    assert pack([1.0, 1.0, 1.0], 2) == pack([1.0, 1.0, 1.0], 2) == ((0, 2), (1,))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 11, 256])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_slices_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    spans = [bounds(count, parts, part) for part in range(parts)]
    assert [i for low, high in spans for i in range(low, high)] == list(range(count))
    sizes = [share(count, parts, part) for part in range(parts)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
