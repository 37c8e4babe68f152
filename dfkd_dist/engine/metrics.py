"""Running means of losses and the time of every phase, over all ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

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
        means: dict[str, float] = defaultdict(float)
        for part in world.gather_objects(own):
            for name, (total, count) in part.items():
                means[name] += total / count
        return dict(sorted(means.items()))

    def throughput(self) -> dict[str, float]:
        """Images per second of each phase."""
        return {p: n / self.seconds[p] for p, n in self.images.items() if n and self.seconds[p] > 0}
