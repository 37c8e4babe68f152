"""A player: a module with its optimiser, schedule and the group of ranks that trains it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.parallel.group import Group

Factor = Callable[[float], float]
"""Progress in [0, 1) to a factor of the learning rate."""


class Player:
    """Trains `module`: gradients live in one flat buffer, summed over `group` in a layout that never changes.

    The fixed layout makes a resumed run bit-equal: DistributedDataParallel rebuilds its buckets after the first step,
    and gloo's order of summation follows an element's position.

    Args:
        name: for metrics, messages and checkpoints.
        module: what is trained; its parameters share one dtype and device.
        make_optimizer: from parameters to an optimiser.
        factor: the schedule.
        total_steps: how many steps the whole run makes with this player.
        group: ranks that hold the same module and share each batch.
        clip: largest norm of the summed gradient, or None.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        factor: Factor,
        total_steps: int,
        group: Group,
        clip: float | None = None,
    ) -> None:
        self.name, self.module, self.group, self.clip = name, module, group, clip
        self.factor, self.total_steps, self.steps = factor, max(total_steps, 1), 0
        self.progress: float | None = None
        """Where the schedule stands, where somebody else counts (rounds of unequal length); None counts own steps."""
        self.followers: list[Player] = []
        """Players that the same loss moves (latents, a head): differentiated, judged and stepped together with this
        one, each over its own group. They are saved by whoever owns them."""
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters)
        self._base = [g["lr"] for g in self.optimizer.param_groups]
        self.gradient = torch.zeros_like(torch.cat([p.detach().reshape(-1) for p in self.parameters]))
        offset = 0
        for p in self.parameters:
            # Views into the flat buffer: backward adds into it, and one all-reduce serves all parameters.
            p.grad = _view_like(self.gradient[offset : offset + p.numel()], p)
            offset += p.numel()

    def backward(self, loss: Tensor) -> None:
        """The gradient of the sum of all members' losses, on every member."""
        together = [self, *self.followers]
        for player in together:
            player.gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        for player in together:
            player.group.sum_(player.gradient)

    def finite(self) -> Tensor:
        """Whether the gradient of the last `backward` holds no NaN and no infinity: a 0-d bool on the device."""
        # The cheapest reduction that lets neither vanish.
        own = self.gradient.sum().isfinite()
        return torch.stack([own, *[player.finite() for player in self.followers]]).all() if self.followers else own

    def step(self) -> None:
        """One optimiser step with the gradient of the last `backward`."""
        if self.clip is not None:
            norm = self.gradient.norm()
            self.gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        progress = self.steps / self.total_steps if self.progress is None else self.progress
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * self.factor(progress)
        self.optimizer.step()
        self.steps += 1
        for player in self.followers:
            player.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves: weights, buffers, optimiser, position in the schedule."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def _view_like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A view with the parameter's shape and strides (convolutions may be channels-last)."""
    strides, shape = parameter.stride(), parameter.shape
    dense = sorted(range(parameter.dim()), key=lambda d: (-strides[d], -shape[d]))
    ordered = flat.view([shape[d] for d in dense])
    return ordered.permute([dense.index(d) for d in range(parameter.dim())])


def constant(progress: float) -> float:
    """No schedule."""
    return 1.0


def cosine(floor: float) -> Factor:
    """From 1 to `floor` along half a cosine (Loshchilov and Hutter 2016)."""
    return lambda progress: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def multistep(milestones: list[float], gamma: float) -> Factor:
    """Multiplied by `gamma` after each milestone (a fraction of all steps)."""
    return lambda progress: gamma ** sum(progress >= m for m in milestones)
