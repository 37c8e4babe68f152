"""CMI and Fast at any world size and after any stop: gloo ranks against one process, and controls that must differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine import build_latent
from dfkd_dist.engine.build import build
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_trace import MAIN, by_collective
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.interceptor import Count, Interceptor
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import EXIT_STOPPED
from dfkd_dist.sources import terms
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis import cmi
from dfkd_dist.sources.synthesis.bank import Bank
from dfkd_dist.sources.synthesis.base import Bench
from tests import recipes
from tests.distributed import playing, running
from tests.distributed.harness import run_ranks
from tests.distributed.playing import Result, Tree
from tests.distributed.running import Leg

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
METHODS: dict[str, Callable[..., Tree]] = {
    "cmi": recipes.cmi,
    "cmi_ga": recipes.cmi_with_assistants,
    "fast": recipes.fast,
    "fast_imagenet": recipes.fast_of_imagenet,
}
VARIANTS: dict[str, tuple[str, Tree]] = {
    "cmi without contrast in the warm-up": (
        "cmi",
        {"source": {"synthesis": {"warmup_loss": {"bn": 1.0, "ce": 1.0}, "keep": "last", "labels": "balanced"}}},
    ),
    "cmi, fewer images than ranks": ("cmi", {"source": {"batch": 3}, "batch": 3}),
    "cmi, adversary on batch statistics": ("cmi", {"source": {"synthesis": {"adversary": {"batch_norm": "batch"}}}}),
    "fast, last gradient": (
        "fast_imagenet",
        {"source": {"synthesis": {"meta": {"gradient": "last"}, "bn_momentum": 0.0, "adv_from": None}}},
    ),
    "fast, sum of gradients of latents too": (
        "fast_imagenet",
        {"source": {"synthesis": {"meta": {"gradient": "sum"}, "keep": "best"}}},
    ),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tree], Result]:
    """One process's result, computed once for each recipe."""
    known: dict[str, Result] = {}

    def result(tree: Tree) -> Result:
        key = repr(tree | {"out": ""})
        if key not in known:
            known[key] = train(0, 1, tree | {"out": str(tmp_path_factory.mktemp("alone") / "run")})
        return known[key]

    return result


def train(rank: int, size: int, tree: Tree, sabotage: str = "") -> Result:
    """Train to the end; everything that promise 1 speaks of, with the pool and the latents' gradients."""
    if sabotage:
        BREAKS[sabotage]()
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    gradients: dict[str, list[Tensor]] = {}
    backward = Player.backward

    def watched(player: Player, loss: Tensor) -> None:
        backward(player, loss)
        for follower in player.followers:
            if follower.name.startswith("latents/"):
                (values,) = follower.parameters
                gradients.setdefault(follower.name, []).append(follower.gradient.view_as(values).clone())

    Player.backward = watched  # type: ignore[method-assign]
    try:
        built.trainer.fit()
    finally:
        Player.backward = backward  # type: ignore[method-assign]
    source, players = built.source, playing._players(built)
    assert isinstance(source, InversionSource)
    kept = source.pool.read(torch.arange(len(source.pool)))
    return {
        "losses": built.trainer.meters.read(built.mesh.world),
        "states": {player.name: playing._whole(player.module.state_dict()) for player in players},
        "momenta": {player.name: playing._momenta(player) for player in players},
        "pool": {name: value for name, value in vars(kept).items() if value is not None},
        "gradients": gradients,
    }


def latents_apart(single: Result, ranks: list[Result]) -> float:
    """Relative deviation of the latents' gradients over all iterations."""
    found = 0.0
    for name, steps in single["gradients"].items():
        holders = [result["gradients"][name] for result in ranks if name in result["gradients"]]
        for n, gradient in enumerate(steps):
            scale = float(gradient.abs().max())
            assert scale > 0
            found = max(found, playing.deviation(torch.cat([steps[n] for steps in holders]), gradient) / scale)
    return found


def assert_equal_to_one(single: Result, ranks: list[Result]) -> None:
    found, gradients = playing.worst(single, ranks), latents_apart(single, ranks)
    print(f"W={len(ranks)}: {found}, latents' gradients {gradients:.1e}")
    assert max(found.values()) < CLOSE and gradients < CLOSE
    for result in ranks:
        for name, value in single["pool"].items():
            assert torch.equal(result["pool"][name], value), name
    assert_replicas_are_bit_equal(ranks)


def assert_replicas_are_bit_equal(ranks: list[Result]) -> None:
    first: dict[str, dict[str, Tensor]] = {}
    for result in ranks:
        for player, state in result["states"].items():
            for name, value in state.items():
                assert torch.equal(value, first.setdefault(player, state)[name]), f"{player}: {name}"


@pytest.mark.parametrize(
    ("method", "count", "size"),
    [
        ("cmi", 1, 2),
        ("cmi", 1, 4),
        pytest.param("cmi", 2, 2, marks=pytest.mark.slow),
        ("cmi", 2, 4),
        pytest.param("cmi_ga", 1, 2, marks=pytest.mark.slow),
        ("cmi_ga", 2, 4),
        ("fast", 1, 2),
        pytest.param("fast", 1, 4, marks=pytest.mark.slow),
        ("fast", 2, 4),
        pytest.param("fast", 2, 3, marks=pytest.mark.slow),
        pytest.param("fast_imagenet", 1, 2, marks=pytest.mark.slow),
        ("fast_imagenet", 2, 4),
    ],
)
def test_a_synthesis_equals_one_process(
    method: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    """All rounds of the schedule; images, labels, gradients of the latents, and all players' weights and moments."""
    tree = METHODS[method](teachers[:count], out=str(tmp_path / "run"))
    single = alone(tree)
    others = {"cmi": ["head"], "cmi_ga": ["head", "assistant"], "fast": ["meta"], "fast_imagenet": ["meta"]}[method]
    assert single["states"].keys() == {"student"} | {
        f"{part}/t{k}" for part in ["generator", *others] for k in range(count)
    }
    assert_equal_to_one(single, run_ranks(train, size, tree))


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_variants_equal_one_process(
    variant: str, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    method, changes = VARIANTS[variant]
    tree = recipes.merged(METHODS[method](teachers, out=str(tmp_path / "run")), changes)
    assert_equal_to_one(alone(tree), run_ranks(train, 4, tree))


# ------------------------------------------------------------------------------------- negative controls


def _indices_of_each_rank() -> None:
    own = Bench.own
    Bench.own = lambda self: own(self) - own(self)[:1]  # type: ignore[method-assign]


def _local_bn_term() -> None:
    terms.combine_moments = lambda layers, count, group: layers  # type: ignore[assignment]


def _local_generator_norm() -> None:
    build_latent.synchronise = lambda module, group: synchronise(module, ALONE)  # type: ignore[assignment]


def _contrast_with_own_images() -> None:
    cmi._whole = lambda part_NE, total, group: (part_NE, 0)  # type: ignore[assignment]


def _bank_drawn_by_each_rank() -> None:
    sample = Bank.sample

    def of_rank(self: Bank, wanted: int, round: int, step: int) -> Tensor:
        return sample(self, wanted, round, step + 100 * self.bench.mesh.row.rank)

    Bank.sample = of_rank  # type: ignore[method-assign]


def _best_of_each_rank() -> None:
    Bench.total = lambda self, losses: losses.total.detach()  # type: ignore[method-assign]


def _only_the_generator_is_summed() -> None:
    """Head and generator are the row's; a mistake that leaves the head's gradient with each rank."""
    step = Player.step

    def alone(self: Player) -> None:
        for follower in self.followers:
            if follower.name.startswith("head/"):
                follower.gradient.mul_(1.0 + self.group.rank)
        step(self)

    Player.step = alone  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "indices of each rank": _indices_of_each_rank,
    "local bn term": _local_bn_term,
    "local generator norm": _local_generator_norm,
    "contrast with own images": _contrast_with_own_images,
    "bank drawn by each rank": _bank_drawn_by_each_rank,
    "head of each rank": _only_the_generator_is_summed,
    "best of each rank": _best_of_each_rank,
}
OF_FAST = ("indices of each rank", "local bn term", "local generator norm")


@pytest.mark.parametrize(("method", "how"), [*[("cmi", how) for how in BREAKS], *[("fast", how) for how in OF_FAST]])
def test_the_comparison_notices(
    method: str, how: str, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    tree = METHODS[method](teachers[:1], rounds={"main": 2}, out=str(tmp_path / "run"))
    single, ranks = alone(tree), run_ranks(train, 2, tree, how)
    found = playing.worst(single, ranks)
    print(f"{how}: {found}")
    assert found["states"] > DIFFERENT


@pytest.mark.parametrize("method", ["cmi", "fast"])
def test_local_synchronisation_is_another_method(
    method: str, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    tree = METHODS[method](teachers[:1], rounds={"main": 2}, out=str(tmp_path / "run"))
    found = playing.worst(alone(tree), run_ranks(train, 2, tree | {"mesh": {"sync": "local"}}))
    assert found["states"] > DIFFERENT


# ------------------------------------------------------------------------------------------------ stopping


def _trees(tree: Tree, folder: Path) -> tuple[Tree, Tree]:
    tree = recipes.merged(tree, {"checkpoint": {"every": 0, "keep": 50}, "log": {"every": 2, "grids": False}})
    return tree | {"out": str(folder / "whole")}, tree | {"out": str(folder / "parts")}


# Steps of each leg: inside a round's iterations, at its harvest, in the assistants' steps, in the student's.
STOPS = {"cmi": [2, 5, 8], "cmi_ga": [2, 7, 3], "fast": [5, 8, 6, 3], "fast_imagenet": [2, 4, 9]}


@pytest.mark.parametrize(
    ("method", "count", "size"),
    [
        ("cmi", 2, 1),
        ("cmi", 1, 2),
        ("cmi_ga", 2, 2),
        ("fast", 2, 1),
        ("fast", 1, 2),
        ("fast_imagenet", 1, 2),
        pytest.param("fast_imagenet", 2, 1, marks=pytest.mark.slow),
        pytest.param("cmi_ga", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    method: str, count: int, size: int, teachers: list[Tree], tmp_path: Path
) -> None:
    single = {"precision": {"train": "fp32", "teacher": "fp32"}}
    whole, parts = _trees(METHODS[method](teachers[:count], **single), tmp_path)
    legs = [Leg(whole), *[Leg(parts, stop) for stop in STOPS[method]], Leg(parts)]
    codes = run_ranks(running.travel, size, legs) if size > 1 else [running.travel(0, 1, legs)]
    assert codes == [[0] + [EXIT_STOPPED] * len(STOPS[method]) + [0]] * size
    assert not running.differences(*(_left(tmp_path / out) for out in ("whole", "parts")))


def _left(folder: Path) -> list[Any]:
    return [running.state(folder), running.metrics(folder), (folder / "student.safetensors").read_bytes()]


@pytest.mark.parametrize("method", ["cmi_ga", "fast_imagenet"])
def test_a_round_can_go_on_with_fewer_ranks(method: str, teachers: list[Tree], tmp_path: Path) -> None:
    """Stopped on four ranks and on two inside a round's iterations, and finished by one process."""
    tree = METHODS[method](teachers[:1])
    if method == "fast_imagenet":
        tree = recipes.merged(tree, {"source": {"synthesis": {"meta": {"gradient": "sum"}, "keep": "best"}}})
    whole, parts = _trees(tree, tmp_path)
    assert running.travel(0, 1, [Leg(whole)]) == [0]
    assert run_ranks(running.travel, 4, [Leg(parts, 6)]) == [[EXIT_STOPPED]] * 4
    assert run_ranks(running.travel, 2, [Leg(parts, 8)]) == [[EXIT_STOPPED]] * 2
    assert running.travel(0, 1, [Leg(parts)]) == [0]
    found = running.differences(
        *([running.state(tmp_path / out), running.metrics(tmp_path / out)] for out in ("whole", "parts"))
    )
    assert all(value < CLOSE for value in found.values()), found


# ---------------------------------------------------------------------------------------------- its plan


def counted(rank: int, size: int, tree: Tree) -> dict[str, Count]:
    """What the interceptor saw in the last round."""
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    rounds: list[dict[str, Count]] = []
    with Interceptor() as seen:
        built.trainer.hooks.after_round = lambda done: rounds.append(seen.take())
        built.trainer.fit()
    return rounds[-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_knows_its_traffic(method: str, teachers: list[Tree], tmp_path: Path) -> None:
    tree = METHODS[method](teachers[:1], rounds={"warmup": 0, "main": 2}, out=str(tmp_path / "run"))
    tree = recipes.merged(tree, {"source": {"pool": {"shard": 1000}}})
    planned, seen = plan(parse(Recipe, tree), 2), run_ranks(counted, 2, tree)
    for rank, found in enumerate(seen):
        assert by_collective(planned.role_of(rank).traffic[MAIN]) == found
