"""Numbers of which each rank of a row optimises its own slice: pixels, or latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.player import Factor, Player, constant
from dfkd_dist.sources.synthesis.base import Bench


class Values(nn.Module):
    """One parameter, `[n, ...]`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class Slice:
    """This rank's slice of a row's values, with its Adam (which works element by element, so slices are enough).

    Args:
        bench: whose row, and which slice.
        name: of the player, for metrics.
        lr: learning rate.
        betas: of Adam.
    """

    def __init__(self, bench: Bench, name: str, lr: float, betas: Sequence[float]) -> None:
        self.bench, self.name, self.lr, self.betas = bench, name, lr, (betas[0], betas[1])
        self.player: Player | None = None

    @property
    def active(self) -> bool:
        """Whether it holds values: between `begin` and `forget`."""
        return self.player is not None

    @property
    def values(self) -> Tensor:
        """The parameter, `[n, ...]`."""
        assert self.player is not None and isinstance(self.player.module, Values)
        return self.player.module.values

    def begin(self, values: Tensor, factor: Factor = constant, total_steps: int = 1) -> Player:
        """Optimise `values` (a copy of them) from now on, with a fresh optimiser and schedule."""

        def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            # A fused kernel refuses tensors without data.
            return torch.optim.Adam(parameters, self.lr, self.betas, fused=not values.is_meta)

        self.player = Player(self.name, Values(values.detach().clone()), adam, factor, total_steps, ALONE)
        return self.player

    def forget(self) -> None:
        """Free the memory."""
        self.player = None

    def state_dict(self) -> dict[str, Any]:
        """Values and moments, whole over the row; all of its ranks ask at once. Empty without values."""
        if self.player is None:
            return {}
        moments = self.player.optimizer.state.get(self.values, {})
        whole = {name: self.bench.whole(moments[name]).cpu() for name in ("exp_avg", "exp_avg_sq") if name in moments}
        return whole | {"values": self.bench.whole(self.values).cpu(), "steps": self.player.steps}

    def load_state_dict(self, state: Mapping[str, Any], factor: Factor = constant, total_steps: int = 1) -> None:
        """Put back what `state_dict` gave, with the schedule that is in force."""
        if not state:
            return self.forget()
        player = self.begin(self.bench.mine(state["values"]), factor, total_steps)
        player.steps = state["steps"]
        if "exp_avg" not in state:
            return None
        moments = {name: self.bench.mine(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        groups = player.optimizer.state_dict()["param_groups"]
        moved = {"step": torch.tensor(float(player.steps)), **moments}
        player.optimizer.load_state_dict({"state": {0: moved}, "param_groups": groups})
        return None


class Best:
    """The batch with the lowest loss so far; copies, so that what is optimised further does not change them.

    Whether a batch is better is decided on the device, and alike on all ranks of the row.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cost: Tensor | None = None
        self.kept: list[Tensor] = []

    def note(self, cost: Tensor, *values: Tensor) -> None:
        """Keep `values` if their cost (`Bench.total`) is below that of those kept."""
        now = [value.detach() for value in values]
        if self.cost is None:
            self.cost, self.kept = cost.clone(), [value.clone() for value in now]
            return
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.kept = [torch.where(better, value, old) for value, old in zip(now, self.kept, strict=True)]

    def forget(self) -> None:
        """Begin anew."""
        self.cost, self.kept = None, []

    def state_dict(self) -> dict[str, Any]:
        """Cost and values, whole over the row; all of its ranks ask at once. Empty where nothing is kept."""
        if self.cost is None:
            return {}
        return {"cost": self.cost.cpu(), "kept": [self.bench.whole(value).cpu() for value in self.kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.forget()
        if state:
            self.cost = state["cost"].to(self.bench.device)
            self.kept = [self.bench.mine(value) for value in state["kept"]]
