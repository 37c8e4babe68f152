"""What ranks do in the equivalence tests, ways to break it, and the comparison with one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine import build as building
from dfkd_dist.models.network import parameter_count
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources import generative, terms
from dfkd_dist.sources.generative import GenerativeSource

Tree = dict[str, Any]
Result = dict[str, Any]


def train(rank: int, size: int, tree: Tree, sabotage: str = "") -> Result:
    """Train the recipe to its end and tell everything that promise 1 speaks of."""
    if sabotage:
        SABOTAGE[sabotage]()
    built = building.build(parse(Recipe, tree), torch.device("cpu"), size)
    watched = _watch(built)
    built.trainer.hooks.observe = lambda round: True
    built.trainer.fit()
    players = _players(built)
    return {
        "losses": built.trainer.meters.read(built.mesh.world),
        "states": {player.name: _whole(player.module.state_dict()) for player in players},
        "momenta": {player.name: _momenta(player) for player in players},
        **watched,
    }


def holdings(rank: int, size: int, tree: Tree) -> tuple[list[str], list[str], int]:
    """Names of the teachers and of the players on this rank, and how many parameters its teachers have."""
    built = building.build(parse(Recipe, tree), torch.device("cpu"), size)
    held = [kit.teacher for kit in built.trainer.source.kits]  # type: ignore[attr-defined]
    assert [teacher.name for teacher in held] == [teacher.name for teacher in built.teachers]
    names = [player.name for player in _players(built)]
    return [teacher.name for teacher in held], names, sum(parameter_count(teacher) for teacher in held)


def _players(built: building.Build) -> list[Player]:
    return [built.trainer.student, *built.trainer.source.players]


def _watch(built: building.Build) -> Result:
    """Filled while training: every player's first summed gradient, and the images' first and last gradients."""
    first: dict[str, Tensor] = {}
    images: dict[str, list[Tensor]] = {}
    for player in _players(built):
        player.backward = partial(_backward, player, first)  # type: ignore[method-assign]
    for kit in getattr(built.trainer.source, "kits", []):
        kit.generator.module.register_forward_hook(partial(_keep_gradient, images.setdefault(kit.teacher.name, [])))
    return {"gradients": first, "images": images}


def _backward(player: Player, first: dict[str, Tensor], loss: Tensor) -> None:
    Player.backward(player, loss)
    first.setdefault(player.name, player.gradient.clone())


def _keep_gradient(kept: list[Tensor], module: Any, args: Any, images_NCHW: Tensor) -> None:
    def note(gradient: Tensor) -> None:
        kept[1:] = [gradient.contiguous()]

    if images_NCHW.requires_grad:
        images_NCHW.register_hook(note)


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}


def _momenta(player: Player) -> dict[str, Tensor]:
    states = player.optimizer.state_dict()["state"]
    return {f"{i}.{k}": v.contiguous() for i, s in states.items() for k, v in s.items() if isinstance(v, Tensor)}


# --------------------------------------------------------------------------------------------- comparing


def deviation(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def worst(alone: Result, ranks: list[Result]) -> dict[str, float]:
    """Largest deviation of losses, weights with buffers, and momenta over all ranks from one process."""
    found = {"losses": 0.0, "states": 0.0, "momenta": 0.0}
    told = {player for result in ranks for player in result["states"]}
    assert told == alone["states"].keys()
    for result in ranks:
        assert result["losses"].keys() == alone["losses"].keys()
        differences = [abs(value - alone["losses"][name]) for name, value in result["losses"].items()]
        found["losses"] = max([found["losses"], *differences])
        for kind in ("states", "momenta"):
            for player, state in result[kind].items():
                assert state.keys() == alone[kind][player].keys()
                found[kind] = max([found[kind], *(deviation(v, alone[kind][player][k]) for k, v in state.items())])
    return found


def image_gradients(alone: Result, ranks: list[Result], which: int) -> float:
    """Relative deviation of the first (0) or last (-1) gradients of generators' losses by their images."""
    found = 0.0
    for name, gradients in alone["images"].items():
        slices = [result["images"][name][which] for result in ranks if name in result["images"]]
        scale = float(gradients[which].abs().max())
        assert scale > 0
        found = max(found, deviation(torch.cat(slices), gradients[which]) / scale)
    return found


# -------------------------------------------------------------------------------------------- sabotage


def _only_own_column() -> None:
    """No exchange: a rank's student sees its own row's images and hears its own teachers, for the others too."""

    def gather(self: Exchange, own: list[Tensor], per_teacher: int) -> Batch:
        block = torch.cat(list(own))
        return Batch(block, per_teacher * len(self.shapes), block)

    def answers(self: Exchange, batch: Batch) -> list[Signals]:
        said = [teacher(batch.images_NCHW, self.need) for teacher in self.teachers]
        return [said[k % len(said)] for k in range(len(self.shapes))]

    Exchange.gather, Exchange.answers = gather, answers  # type: ignore[assignment,method-assign]


def _answers_to_other_images() -> None:
    send_home = Exchange._send_home

    def wrong(self: Exchange, said: list[Signals], homes: list[slice], dtype: torch.dtype) -> list[Signals]:
        rolled = [Signals(s.logits_NC.roll(1, 0), None, s.map_NDHW) for s in said]
        return send_home(self, rolled, homes, dtype)

    Exchange._send_home = wrong  # type: ignore[assignment,method-assign]


def _deal_by_row() -> None:
    """Each student is dealt its own row's images (where all rows make equally many); answers still travel."""
    gather = Exchange.gather

    def by_row(self: Exchange, own: list[Tensor], per_teacher: int) -> Batch:
        batch, rows = gather(self, own, per_teacher), self.mesh.column.size
        assert batch.column_NCHW is not None
        order = torch.arange(len(batch.column_NCHW)).view(rows, -1).t().reshape(-1)
        column_NCHW = batch.column_NCHW[order]
        return replace(batch, images_NCHW=column_NCHW[self.mesh.column.rank :: rows], column_NCHW=column_NCHW)

    Exchange.gather = by_row  # type: ignore[assignment,method-assign]


def _rank_indices() -> None:
    """Every rank of a row draws its latents as if its slice were the first."""
    own = GenerativeSource._own
    GenerativeSource._own = lambda self, count: own(self, count) - own(self, count)[:1]  # type: ignore[method-assign]


def _gradients_of_a_row_stay() -> None:
    sum_ = Group.sum_
    Group.sum_ = lambda self, t: t if self.size == 2 and t.numel() > 5000 else sum_(self, t)  # type: ignore[method-assign]


def _local_batch_norm() -> None:
    building.synchronise = lambda module, group: synchronise(module, ALONE)


def _local_bn_term() -> None:
    terms.combine_moments = lambda layers, count, group: layers  # type: ignore[assignment]


def _local_bce() -> None:
    terms.sum_own = lambda tensor, group: tensor * group.size


def _bce_gradient_counted_by_each_rank() -> None:
    """A usual mistake: an all-reduce whose backward sums over the ranks again."""
    sum_own = terms.sum_own
    terms.sum_own = lambda t, group: sum_own(t, group) + (group.size - 1) * (t - t.detach())


def _readers_move_buffers() -> None:
    generative.reading_only = lambda module, mode, group=ALONE: nullcontext()  # type: ignore[assignment]


SABOTAGE: dict[str, Callable[[], None]] = {
    "only own column": _only_own_column,
    "answers to other images": _answers_to_other_images,
    "deal by row": _deal_by_row,
    "rank indices": _rank_indices,
    "gradients of a row stay": _gradients_of_a_row_stay,
    "local batch norm": _local_batch_norm,
    "local bn term": _local_bn_term,
    "local bce": _local_bce,
    "bce gradient counted by each rank": _bce_gradient_counted_by_each_rank,
    "readers move buffers": _readers_move_buffers,
}
