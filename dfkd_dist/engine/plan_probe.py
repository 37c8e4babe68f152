"""How fast this machine runs a recipe's arithmetic, measured by a few real steps; only when somebody asks."""

from __future__ import annotations

import time

import torch

from dfkd_dist.config import Recipe
from dfkd_dist.engine.build import build
from dfkd_dist.engine.plan_trace import MAIN, dry_recipe, plan_cards, trace
from dfkd_dist.engine.teachers import teacher_costs
from dfkd_dist.parallel.topology import make_topology

BATCH = 32
"""Images of a probe's step, at most."""


def measured_rate(recipe: Recipe, device: torch.device, batch: int = BATCH) -> float:
    """FLOP per second of this process on the recipe's own networks, for `engine.plan.plan`.

    One main round with one step per phase is run after another for warming up, with random teachers and at most
    `batch` images; small batches may use a device less well than the recipe's. No other rank takes part.
    """
    cards = plan_cards(recipe)
    small = dry_recipe(recipe, cards)
    small = small.model_copy(
        update={
            "batch": max(len(cards), min(batch, recipe.batch)),
            "rounds": small.rounds.model_copy(update={"warmup": 0}),
            "mesh": small.mesh.model_copy(update={"rows": None}),
        }
    )
    flops = trace(small, cards, make_topology(1, teacher_costs(cards)), 0).flops[MAIN]
    ends: list[float] = []

    def after_round(done: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    built = build(small, device)
    built.trainer.hooks.after_round = after_round
    built.trainer.fit()
    return sum(flops.values()) / (ends[-1] - ends[-2])
