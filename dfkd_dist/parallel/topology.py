"""Which rank holds which teacher: plain arithmetic over integers, valid without any process group.

T rows x R columns of ranks. Row t is its teachers' own group of ranks; a column holds one rank of every row.
Ranks are numbered row by row, so that a row is a contiguous span (one node, where it fits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """A mesh of `rows` x `columns` ranks and the teachers of each row.

    Args:
        rows: T.
        columns: R; the world is T x R.
        teachers: for each row, the indices of its teachers in recipe order.
    """

    rows: int
    columns: int
    teachers: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        """W = T x R."""
        return self.rows * self.columns

    def row_of(self, rank: int) -> int:
        """The row of a rank."""
        return rank // self.columns

    def column_of(self, rank: int) -> int:
        """The replica index of a rank in its row."""
        return rank % self.columns

    def row_ranks(self, row: int) -> tuple[int, ...]:
        """World ranks of a row."""
        return tuple(range(row * self.columns, (row + 1) * self.columns))

    def column_ranks(self, column: int) -> tuple[int, ...]:
        """World ranks of a column, by row."""
        return tuple(range(column, self.world_size, self.columns))


def make_topology(world_size: int, costs: Sequence[float], rows: int | None = None) -> Topology:
    """Rows and the teachers packed into them by cost.

    Args:
        world_size: W.
        costs: one per teacher (FLOPs or parameters); empty where a run has no teachers.
        rows: T, or None for the largest divisor of W that is at most the number of teachers.

    Raises:
        ValueError: `rows` does not divide the ranks, or exceeds the number of teachers.
    """
    limit = max(len(costs), 1)
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    if rows is None:
        rows = max(d for d in divisors if d <= limit)
    elif rows not in divisors:
        raise ValueError(f"mesh.rows is {rows}, which does not divide the {world_size} ranks; allowed: {divisors}")
    elif rows > limit:
        allowed = [d for d in divisors if d <= limit]
        raise ValueError(f"mesh.rows is {rows}, more than the {limit} teachers; allowed: {allowed}")
    return Topology(rows, world_size // rows, pack(costs, rows))


def pack(costs: Sequence[float], rows: int) -> tuple[tuple[int, ...], ...]:
    """Teachers to rows: the dearest first, each to the row with the least so far; no row stays empty."""
    held: list[list[int]] = [[] for _ in range(rows)]
    load = [0.0] * rows
    for teacher in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        # An empty row comes first, or a teacher of cost 0 could leave one empty.
        row = min(range(rows), key=lambda t: (len(held[t]) > 0 and load[t] > 0, load[t], len(held[t]), t))
        held[row].append(teacher)
        load[row] += costs[teacher]
    return tuple(tuple(sorted(row)) for row in held)


def bounds(count: int, parts: int, part: int) -> tuple[int, int]:
    """The span [low, high) of `count` items that falls to `part`; sizes differ by at most one."""
    return count * part // parts, count * (part + 1) // parts


def share(count: int, parts: int, part: int) -> int:
    """How many of `count` items fall to `part`."""
    low, high = bounds(count, parts, part)
    return high - low
