"""The same answer at any world size: gloo ranks against one process, and controls that must come out different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.trainer import Trainer
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.generative import GenerativeSource, Kit
from tests import recipes
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

CLOSE = 1e-9
Result = dict[str, Any]
Tree = dict[str, Any]


# ---------------------------------------------------------------------------------------------- what a rank does


def _train(rank: int, size: int, tree: Tree, sabotage: str = "") -> Result:
    """Train the recipe to its end and tell everything that promise 1 speaks of."""
    if sabotage:
        SABOTAGE[sabotage]()
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    watched = _watch(built)
    built.trainer.hooks.observe = lambda round: True
    built.trainer.fit()
    players = [built.trainer.student, *built.trainer.source.players]
    return {
        "losses": built.trainer.meters.read(built.mesh.world),
        "states": {player.name: _numbers(player.module.state_dict()) for player in players},
        "momenta": {player.name: _momenta(player) for player in players},
        **watched,
    }


def _watch(built: Build) -> Result:
    """Filled while training: every player's first summed gradient, and the images' first and last gradients."""
    first: dict[str, Tensor] = {}
    images: dict[str, list[Tensor]] = {}
    source = built.trainer.source
    assert isinstance(source, GenerativeSource)
    for player in [built.trainer.student, *source.players]:
        player.backward = partial(_backward, player, first)  # type: ignore[method-assign]
    for kit in source.kits:
        kit.generator.module.register_forward_hook(partial(_keep_gradient, images, kit.teacher.name))
    return {"gradients": first, "images": images}


def _backward(player: Player, first: dict[str, Tensor], loss: Tensor) -> None:
    Player.backward(player, loss)
    first.setdefault(player.name, player.gradient.clone())


def _keep_gradient(kept: dict[str, list[Tensor]], name: str, module: Any, args: Any, images_NCHW: Tensor) -> None:
    if images_NCHW.requires_grad:
        images_NCHW.register_hook(lambda gradient: _first_and_last(kept.setdefault(name, []), gradient.contiguous()))


def _first_and_last(kept: list[Tensor], gradient: Tensor) -> None:
    kept[1:] = [gradient]


def _numbers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}


def _momenta(player: Player) -> dict[str, Tensor]:
    states = player.optimizer.state_dict()["state"]
    return {f"{i}.{k}": v.contiguous() for i, s in states.items() for k, v in s.items() if isinstance(v, Tensor)}


# ------------------------------------------------------------------------------------------------ sabotage


def _only_own_column() -> None:
    """No exchange: each rank's student sees its own row's images and hears its own teachers, for all others too."""

    def gather(self: Exchange, own: list[Tensor], per_teacher: int) -> Batch:
        block = torch.cat(list(own))
        return Batch(block, per_teacher * len(self.shapes), block)

    def answers(self: Exchange, batch: Batch) -> list[Signals]:
        said = [teacher(batch.images_NCHW, self.need) for teacher in self.teachers]
        return [said[k % len(said)] for k in range(len(self.shapes))]

    Exchange.gather, Exchange.answers = gather, answers  # type: ignore[assignment,method-assign]


def _answers_to_other_images() -> None:
    """Every student keeps the answers to the first images of its column, whichever it was dealt."""
    send_home = Exchange._send_home

    def wrong(self: Exchange, said: list[Signals], total: int, dtype: torch.dtype) -> list[Signals]:
        rolled = [Signals(s.logits_NC.roll(1, 0), None, s.map_NDHW) for s in said]
        return send_home(self, rolled, total, dtype)

    Exchange._send_home = wrong  # type: ignore[assignment,method-assign]


def _one_row_of_latents() -> None:
    """Every rank of a row draws the first rank's latents."""
    own = GenerativeSource._own
    GenerativeSource._own = lambda self, count: own(self, count) - own(self, count)[0]  # type: ignore[method-assign]


def _no_sum_of_gradients() -> None:
    """Generators and assistants step with this rank's own gradient."""
    sum_ = Group.sum_

    def wrong(self: Group, tensor: Tensor) -> Tensor:
        return tensor if self.size == 2 and tensor.numel() > 5000 else sum_(self, tensor)

    Group.sum_ = wrong  # type: ignore[method-assign]


def _dealt_by_rows() -> None:
    """Not wrong, only unbalanced: position j goes to another student than j mod T."""
    gather = Exchange._gather_images

    def sorted_by_teacher(self: Exchange, own: list[Tensor], per_teacher: int) -> Tensor:
        images, rows = gather(self, own, per_teacher), self.mesh.column.size
        order = [j for start in range(0, len(images), rows * rows) for j in range(start, start + rows * rows)]
        order = sorted((j for j in order if j < len(images)), key=lambda j: (j % 3, -j))
        return images[order]

    Exchange._gather_images = sorted_by_teacher  # type: ignore[assignment,method-assign]


SABOTAGE: dict[str, Callable[[], None]] = {
    "only own column": _only_own_column,
    "answers to other images": _answers_to_other_images,
    "one row of latents": _one_row_of_latents,
    "no sum of gradients": _no_sum_of_gradients,
    "dealt by rows": _dealt_by_rows,
}


# ---------------------------------------------------------------------------------------------- comparing


def _deviation(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    return float((a.double() - b.double()).abs().max())


def _worst(alone: Result, ranks: list[Result]) -> dict[str, float]:
    """The largest deviation of losses, weights with buffers, and momenta over all ranks from one process."""
    worst = {"losses": 0.0, "states": 0.0, "momenta": 0.0}
    for result in ranks:
        assert result["losses"].keys() == alone["losses"].keys()
        for name, value in result["losses"].items():
            worst["losses"] = max(worst["losses"], abs(value - alone["losses"][name]))
        for kind in ("states", "momenta"):
            for player, state in result[kind].items():
                assert state.keys() == alone[kind][player].keys()
                deviations = [_deviation(value, alone[kind][player][key]) for key, value in state.items()]
                worst[kind] = max([worst[kind], *deviations])
    return worst


def _images_deviation(alone: Result, ranks: list[Result], which: int) -> float:
    """Of the gradients of the generators' losses with respect to their images, slices put together."""
    worst = 0.0
    for name, gradients in alone["images"].items():
        slices = [result["images"][name][which] for result in ranks if name in result["images"]]
        whole = gradients[which]
        worst = max(worst, _deviation(torch.cat(slices), whole) / float(whole.abs().max()))
    return worst


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 3)


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[[Tree], Result]]:
    """One process's result, computed once for each recipe."""
    known: dict[str, Result] = {}

    def result(tree: Tree) -> Result:
        key = repr(tree)
        if key not in known:
            known[key] = _train(0, 1, tree)
        return known[key]

    yield result


# -------------------------------------------------------------------------------------------------- promise 1

GAMES: dict[str, Callable[[list[Tree]], Tree]] = {
    "dfmf": recipes.dfmf,
    "dfq-eval": recipes.dfq,
    "dfq-batch": partial(recipes.dfq, batch_norm="batch"),
}
LAYOUTS = [(1, 2), (1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)]


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize(("count", "size"), LAYOUTS)
def test_twenty_rounds_as_one_process(
    game: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = GAMES[game](teachers[:count])
    single, ranks = alone(tree), run_ranks(_train, size, tree)
    worst = _worst(single, ranks)
    print(f"{game} K={count} W={size}: {worst} first image gradient {_images_deviation(single, ranks, 0):.1e}")
    assert max(worst.values()) < CLOSE
    assert _images_deviation(single, ranks, 0) < 1e-12
    assert _images_deviation(single, ranks, -1) < CLOSE
    _students_are_bit_equal(ranks)


def _students_are_bit_equal(ranks: list[Result]) -> None:
    for result in ranks[1:]:
        for name, value in result["states"]["student"].items():
            assert torch.equal(value, ranks[0]["states"]["student"][name]), name
