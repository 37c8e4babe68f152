"""What is remembered of the images of earlier rounds, for contrast with new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.sources.synthesis.base import Bench


class Bank:
    """The newest `size` rows of features; the same on every rank of a row, since each adds all of the row's.

    Args:
        bench: whose row.
        size: how many rows; then the oldest go first.
    """

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size = bench, size
        self.filled, self.next = 0, 0
        self._rows_MF: Tensor | None = None

    def add(self, rows_NF: Tensor) -> None:
        """Take in rows, the oldest first."""
        rows_NF = rows_NF.detach()[-self.size :]
        if self._rows_MF is None:
            self._rows_MF = rows_NF.new_empty(self.size, rows_NF.shape[1])
        places_N = (self.next + torch.arange(len(rows_NF), device=rows_NF.device)) % self.size
        self._rows_MF[places_N] = rows_NF
        self.next = (self.next + len(rows_NF)) % self.size
        self.filled = min(self.size, self.filled + len(rows_NF))

    def count(self, wanted: int) -> int:
        """How many rows `sample` gives."""
        return min(wanted, self.filled)

    def sample(self, wanted: int, round: int, step: int) -> Tensor:
        """Numbers of `count(wanted)` rows, all different; the same on every rank."""
        bench = self.bench
        order = bench.randomness.permutation(
            "bank", self.filled, owner=bench.name, round=round, step=step, device=bench.device
        )
        return order[:wanted]

    def rows(self, numbers_N: Tensor) -> Tensor:
        """`[N, F]`."""
        assert self._rows_MF is not None
        return self._rows_MF[numbers_N]

    def state_dict(self) -> dict[str, Any]:
        """Rows in their places, and where the next goes; empty where there are none."""
        if self._rows_MF is None:
            return {}
        return {"rows": self._rows_MF[: self.filled].cpu().clone(), "next": self.next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.filled, self.next, self._rows_MF = 0, 0, None
        if state:
            self.add(state["rows"].to(self.bench.device))
            self.next = state["next"]
