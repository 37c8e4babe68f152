"""In which order images of a pool are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_dist.parallel.randomness import Randomness


class PoolOrder:
    """Endless passes over so many images, each in an order of its own; the same on every rank and after any resume.

    Args:
        randomness: counter-based.
        purpose: of the draws.
        owner: of the draws.
    """

    def __init__(self, randomness: Randomness, purpose: str, owner: str = "") -> None:
        self.randomness, self.purpose, self.owner = randomness, purpose, owner
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def at(self, places_n: Tensor, count: int, round: int) -> Tensor:
        """Which of `count` images stand at these places of a round's passes: int64 on the CPU, like `places_n`."""
        pass_n, place_n = places_n // count, places_n % count
        numbers_n = torch.empty_like(places_n)
        for number in pass_n.unique().tolist():
            here_n = pass_n == number
            numbers_n[here_n] = self._order(round, number, count)[place_n[here_n]]
        return numbers_n

    def _order(self, round: int, number: int, count: int) -> Tensor:
        key = (round, number, count)
        if key not in self._orders:
            while len(self._orders) > 2:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = self.randomness.permutation(
                self.purpose, count, owner=self.owner, round=round, step=number
            )
        return self._orders[key]
