"""Running means of losses and the time of every phase, over all ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.parallel.group import Group


class Meters:
    """Sums since the last `read`; a rank's loss terms are shares of the global ones, so ranks add up.

    Args:
        device: CUDA work is waited for before a clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds in each phase since the start of the process."""
        self.images: dict[str, int] = defaultdict(int)
        """Images through each phase, all ranks together, since the start of the process."""

    @contextmanager
    def time(self, phase: str, images: int = 0) -> Iterator[None]:
        """Count the time inside as `phase`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start
        self.images[phase] += images

    def add(self, player: str, losses: Losses) -> None:
        """Take in one step's terms and reports."""
        values = {f"{player}/{name}": value.detach() for name, value in losses.terms.items()}
        values |= {f"{player}/{name}": value for name, value in losses.report.items()}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] += 1

    def read(self, world: Group) -> dict[str, float]:
        """Means since the last call, the same on every rank; starts anew."""
        own = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        self._sums, self._counts = {}, defaultdict(int)
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for part in world.gather_objects(own):
            for name, (total, count) in part.items():
                totals[name] += total
                counts[name] = max(counts[name], count)  # ranks without the player may hold an old sum of it
        return {name: totals[name] / counts[name] for name in sorted(totals)}

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums since the last `read`."""
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dicts(self, states: list[dict[str, Any]], world: Group) -> None:
        """Go on with the sums of all ranks, in rank order; where their number is another, rank 0 takes them all."""
        if len(states) == world.size:
            sums, counts = states[world.rank]["sums"], states[world.rank]["counts"]
        else:
            sums, counts = _merged(states)
            sums = sums if world.rank == 0 else {name: torch.zeros_like(total) for name, total in sums.items()}
        self._sums = {name: total.to(self.device) for name, total in sums.items()}
        self._counts = defaultdict(int, counts)

    def throughput(self) -> dict[str, float]:
        """Images per second of each phase."""
        return {p: n / self.seconds[p] for p, n in self.images.items() if n and self.seconds[p] > 0}


def _merged(states: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for state in states:
        for name, total in state["sums"].items():
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = max(counts.get(name, 0), state["counts"][name])
    return sums, counts
