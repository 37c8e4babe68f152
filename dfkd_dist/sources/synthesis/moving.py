"""The term `bn` against a moving average of the batch's statistics over rounds (Fast)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dfkd_dist.config import BNTermSpec
from dfkd_dist.losses.statistics import averaged
from dfkd_dist.models.signals import LayerStatistics
from dfkd_dist.parallel.statistics import Moments
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.terms import GeneratorStep, bn_term, global_layers


class MovingStatistics:
    """Means and variances of one teacher's layers, averaged over rounds.

    The term compares `(1 - m) x the batch's + m x the average`; the first round has the batch's own. At a round's end
    the last iteration's statistics enter the average.

    Args:
        bench: whose teacher.
        spec: how the term is measured.
        momentum: m; with 0 nothing is remembered.
    """

    def __init__(self, bench: Bench, spec: BNTermSpec, momentum: float) -> None:
        self.bench, self.spec, self.momentum = bench, spec, momentum
        self._average: list[Moments] = []
        self._latest: list[Moments] = []

    def term(self, step: GeneratorStep) -> Tensor:
        """This rank's share of the term."""
        layers = global_layers(step)
        self._latest = [Moments(layer.mean_C.detach(), layer.var_C.detach()) for layer in layers]
        if self._average:
            mixed = self._mixed([Moments(layer.mean_C, layer.var_C) for layer in layers])
            layers = [
                LayerStatistics(m.mean_C, m.var_C, layer.stored_mean_C, layer.stored_var_C)
                for m, layer in zip(mixed, layers, strict=True)
            ]
        return step.shared(bn_term(layers, self.spec))

    def end_round(self) -> None:
        """Take the last iteration's statistics into the average."""
        if self.momentum > 0 and self._latest:
            self._average = self._mixed(self._latest) if self._average else self._latest
        self._latest = []

    def _mixed(self, latest: Sequence[Moments]) -> list[Moments]:
        return [
            Moments(averaged(new.mean_C, old.mean_C, self.momentum), averaged(new.var_C, old.var_C, self.momentum))
            for new, old in zip(latest, self._average, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Average and latest statistics as [mean, variance] of each layer; empty where there are none."""
        kept = {"average": self._average, "latest": self._latest}
        return {name: [[m.mean_C.cpu(), m.var_C.cpu()] for m in moments] for name, moments in kept.items() if moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._average, self._latest = (self._moments(state.get(name, [])) for name in ("average", "latest"))

    def _moments(self, pairs: Sequence[Sequence[Tensor]]) -> list[Moments]:
        device = self.bench.device
        return [Moments(mean_C.to(device), var_C.to(device)) for mean_C, var_C in pairs]
