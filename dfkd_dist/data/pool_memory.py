"""Rows numbered from 0 on, of which the newest are in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Recent:
    """The newest `capacity` rows: row i lies at place i mod capacity, so that nothing is ever moved.

    Args:
        capacity: rows that are kept.
        shape: of a row.
        dtype: of the rows.
        device: where they lie; memory is taken when the first row comes.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.capacity, self.shape, self.dtype, self.device = capacity, shape, dtype, device
        self.end = 0
        """Number of the next row."""
        self._rows: Tensor | None = None

    @property
    def start(self) -> int:
        """Number of the oldest row that is kept."""
        return max(0, self.end - self.capacity)

    def append(self, rows: Tensor) -> None:
        """Take in rows, the oldest kept ones making room.

        Raises:
            ValueError: more rows at once than are kept.
        """
        if len(rows) > self.capacity:
            raise ValueError(f"{len(rows)} rows at once, but only {self.capacity} are kept")
        if self._rows is None:
            self._rows = torch.empty(self.capacity, *self.shape, dtype=self.dtype, device=self.device)
        places = torch.arange(self.end, self.end + len(rows), device=self.device) % self.capacity
        self._rows[places] = rows.to(self.device, self.dtype)
        self.end += len(rows)

    def skip_to(self, end: int) -> None:
        """Go on numbering at `end`; what was kept is forgotten."""
        self.end = end

    def take(self, ids_n: Tensor) -> Tensor:
        """Rows by number (not checked: that would wait for the device)."""
        if self._rows is None:
            return torch.empty(0, *self.shape, dtype=self.dtype, device=self.device)
        return self._rows[ids_n.to(self.device) % self.capacity]


class Column:
    """Rows on the CPU that only grow, in memory that doubles."""

    def __init__(self) -> None:
        """No rows yet; the first ones say of what shape they are."""
        self._rows: Tensor | None = None
        self._count = 0

    @property
    def rows(self) -> Tensor:
        """All of them, as a view."""
        assert self._rows is not None
        return self._rows[: self._count]

    def append(self, rows: Tensor) -> None:
        """Take in rows of one shape and format."""
        count = self._count + len(rows)
        if self._rows is None:
            self._rows = rows.clone()
        elif count > len(self._rows):
            grown = torch.empty(max(count, 2 * len(self._rows)), *rows.shape[1:], dtype=rows.dtype, device="cpu")
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._rows[self._count : count] = rows
        self._count = count
