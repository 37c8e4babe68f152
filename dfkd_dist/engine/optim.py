"""From a recipe's optimiser and schedule to objects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dfkd_dist.config import OptimizerSpec, ScheduleSpec
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.player import Factor, Player, constant, cosine, multistep


def make_player(
    name: str, module: nn.Module, optimizer: OptimizerSpec, schedule: ScheduleSpec, total_steps: int, group: Group
) -> Player:
    """A player as the recipe describes it."""
    return Player(name, module, _maker(optimizer), _factor(schedule), total_steps, group, optimizer.clip)


def _maker(spec: OptimizerSpec) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    # fused: one kernel over all parameters, on CPU too.
    match spec.kind:
        case "sgd":
            return lambda ps: torch.optim.SGD(
                ps, spec.lr, spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov, fused=True
            )
        case "adam" | "adamw":
            kind = torch.optim.Adam if spec.kind == "adam" else torch.optim.AdamW
            betas = (spec.betas[0], spec.betas[1])
            return lambda ps: kind(ps, spec.lr, betas, weight_decay=spec.weight_decay, fused=True)


def _factor(spec: ScheduleSpec) -> Factor:
    match spec.kind:
        case "constant":
            return constant
        case "cosine":
            return cosine(spec.floor)
        case "multistep":
            return multistep(spec.milestones, spec.gamma)
