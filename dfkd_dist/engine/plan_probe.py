"""How fast this machine runs a recipe's arithmetic, measured by a few real steps; only when somebody asks."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from dfkd_dist.config import Recipe
from dfkd_dist.engine.build import build
from dfkd_dist.engine.plan_trace import MAIN, dry_recipe, plan_cards, trace
from dfkd_dist.engine.teachers import teacher_costs
from dfkd_dist.parallel.topology import make_topology

BATCH = 32
"""Images of a probe's step, at most."""
ROUNDS = 3
"""Rounds that are timed."""


def measured_rate(recipe: Recipe, device: torch.device, batch: int = BATCH) -> float:
    """FLOP per second of this process on the recipe's own networks, for `engine.plan.plan`.

    The fastest of a few main rounds with one step per phase, after one for warming up, with random teachers and at
    most `batch` images; small batches may use a device less well than the recipe's. No other rank takes part.
    """
    cards = plan_cards(recipe)
    small = dry_recipe(recipe, cards)
    small = small.model_copy(
        update={
            "batch": max(len(cards), min(batch, recipe.batch)),
            "rounds": small.rounds.model_copy(update={"warmup": 0, "main": 1 + ROUNDS}),
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
    return sum(flops.values()) / min(end - start for start, end in pairwise(ends))
