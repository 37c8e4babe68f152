"""Inversion at any world size and after any stop: gloo ranks against one process, and controls that must differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.data.pool_shards import TARGETS
from dfkd_dist.data.shards.verify import verify
from dfkd_dist.engine.build import build
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_trace import MAIN, WARM_UP, by_collective
from dfkd_dist.engine.quality import measure
from dfkd_dist.engine.synthesize import synthesize
from dfkd_dist.parallel.interceptor import Count, Interceptor
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import EXIT_LOST_RANK, EXIT_STOPPED
from dfkd_dist.sources import terms
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis.base import Bench
from tests import recipes
from tests.distributed import playing, running
from tests.distributed.harness import run_ranks, start_ranks
from tests.distributed.playing import Result, Tree
from tests.distributed.running import Leg

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
VARIANTS: dict[str, Tree] = {
    "stored": {"source": {"pool": {"targets": "stored"}}},
    "other forms": {
        "source": {
            "synthesis": {
                "keep": "best",
                "labels": "random",
                "l2_over": "batch",
                "clip": False,
                "competition": {"form": "negative", "divergence": "jensen_shannon", "batch_norm": "batch"},
                "bn": {"form": "gaussian_kl"},
            }
        },
        "objective": {"vid": 1.0},
    },
    "fewer images than ranks": {"source": {"batch": 3}, "batch": 3},
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
    """Train to the end; everything that promise 1 speaks of, with the pool and the pixels' gradients."""
    if sabotage:
        BREAKS[sabotage]()
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    gradients: dict[str, list[Tensor]] = {}
    backward = Player.backward

    def watched(player: Player, loss: Tensor) -> None:
        backward(player, loss)
        if player.name.startswith("pixels/"):
            gradients.setdefault(player.name, []).append(player.gradient.clone())

    Player.backward = watched  # type: ignore[method-assign]
    try:
        built.trainer.fit()
    finally:
        Player.backward = backward  # type: ignore[method-assign]
    source, student = built.source, built.trainer.student
    assert isinstance(source, InversionSource)
    kept = source.pool.read(torch.arange(len(source.pool)))
    return {
        "losses": built.trainer.meters.read(built.mesh.world),
        "states": {"student": playing._whole(student.module.state_dict())},
        "momenta": {"student": playing._momenta(student)},
        "pool": {name: value for name, value in vars(kept).items() if value is not None},
        "gradients": gradients,
    }


def pixels_apart(single: Result, ranks: list[Result]) -> float:
    """Relative deviation of the pixels' gradients over all iterations."""
    found = 0.0
    for name, steps in single["gradients"].items():
        holders = [result["gradients"][name] for result in ranks if name in result["gradients"]]
        for n, gradient in enumerate(steps):
            scale = float(gradient.abs().max())
            assert scale > 0
            found = max(found, playing.deviation(torch.cat([steps[n] for steps in holders]), gradient) / scale)
    return found


def assert_equal_to_one(single: Result, ranks: list[Result]) -> None:
    found, gradients = playing.worst(single, ranks), pixels_apart(single, ranks)
    print(f"W={len(ranks)}: {found}, pixels' gradients {gradients:.1e}")
    assert max(found.values()) < CLOSE and gradients < CLOSE
    for result in ranks:
        for name, value in single["pool"].items():
            if name == "logits_NKC":
                assert playing.deviation(result["pool"][name], value) < CLOSE
                assert torch.equal(result["pool"][name], ranks[0]["pool"][name])
            else:
                assert torch.equal(result["pool"][name], value), name
        for name, value in ranks[0]["states"]["student"].items():
            assert torch.equal(result["states"]["student"][name], value), name


@pytest.mark.parametrize(("count", "size"), [(1, 2), (1, 4), (2, 2), (2, 3), (2, 4)])
def test_inversion_equals_one_process(
    count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    """A warm-up round and four with the student as opponent; images, their gradients, pool and student."""
    tree = recipes.inversion(teachers[:count], out=str(tmp_path / "run"))
    single = alone(tree)
    assert len(single["pool"]["labels_N"]) == 35 * count
    assert {f"pixels/t{k}/js" for k in range(count)} <= single["losses"].keys()
    assert_equal_to_one(single, run_ranks(train, size, tree))
    assert not verify(tmp_path / "run" / "pool").findings


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_variants_equal_one_process(
    variant: str, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    tree = recipes.merged(recipes.inversion(teachers, out=str(tmp_path / "run")), VARIANTS[variant])
    assert_equal_to_one(alone(tree), run_ranks(train, 4, tree))


# ------------------------------------------------------------------------------------- negative controls


def _noise_as_if_first() -> None:
    own = Bench.own
    Bench.own = lambda self: own(self) - own(self)[:1]  # type: ignore[method-assign]


def _jitter_of_each_rank() -> None:
    one = Bench.one

    def of_rank(self: Bench, purpose: str, high: int, count: int, round: int, step: int) -> list[int]:
        return one(self, f"{purpose}{self.mesh.row.rank}", high, count, round, step)

    Bench.one = of_rank  # type: ignore[method-assign]


def _local_bn_term() -> None:
    terms.combine_moments = lambda layers, count, group: layers  # type: ignore[assignment]


def _local_sums() -> None:
    """Of the TV term and the competition."""
    terms.sum_own = lambda tensor, group: tensor * group.size


def _shares_of_gradient_too() -> None:
    """A usual mistake: the gradient is divided by the ranks like the value."""
    terms.share_of = lambda value, sync, total: value / total


def _best_of_each_rank() -> None:
    """One rank's best is another one's worst."""
    Bench.total = lambda self, losses: losses.total.detach() * (1 - 2 * self.mesh.row.rank)  # type: ignore[method-assign]


def _pool_in_the_order_of_ranks() -> None:
    gathered = InversionSource._gathered
    InversionSource._gathered = lambda self, own: gathered(self, own).flip(0)  # type: ignore[method-assign]


def _images_of_the_first_rank_for_all() -> None:
    slots = InversionSource._slots
    InversionSource._slots = lambda self: slots(self) * 0  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "noise as if first": _noise_as_if_first,
    "jitter of each rank": _jitter_of_each_rank,
    "local bn term": _local_bn_term,
    "local sums": _local_sums,
    "shares of gradient too": _shares_of_gradient_too,
    "best of each rank": _best_of_each_rank,
    "pool in the order of ranks": _pool_in_the_order_of_ranks,
    "images of the first rank for all": _images_of_the_first_rank_for_all,
}


OF_WHAT_IS_KEPT = ("best of each rank", "pool in the order of ranks", "images of the first rank for all")
"""These leave the synthesis alone until the student that it played against is another."""


@pytest.mark.parametrize("how", BREAKS)
def test_the_comparison_notices(
    how: str, teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    # With a large step the best batch is not the last.
    best = {"synthesis": {"keep": "best", "lr": 1.0}}
    tree = recipes.inversion(teachers[:1], rounds={"main": 2}, out=str(tmp_path / "run"), source=best)
    single, ranks = alone(tree), run_ranks(train, 2, tree, how)
    found = playing.worst(single, ranks)
    print(f"{how}: {found}")
    assert found["states"] > DIFFERENT
    assert pixels_apart(single, ranks) > DIFFERENT or how in OF_WHAT_IS_KEPT


def test_local_synchronisation_is_another_method(
    teachers: list[Tree], alone: Callable[[Tree], Result], tmp_path: Path
) -> None:
    tree = recipes.inversion(teachers[:1], rounds={"main": 2}, out=str(tmp_path / "run"))
    ranks = run_ranks(train, 2, tree | {"mesh": {"sync": "local"}})
    assert pixels_apart(alone(tree), ranks) > DIFFERENT


# ------------------------------------------------------------------------------------------ afterwards


def measured(rank: int, size: int, tree: Tree) -> dict[str, Any]:
    """Agreement on the pool, after training."""
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    built.trainer.fit()
    return measure(built, per_generator=9, batch=4)["pool"].as_dict()


def test_agreement_on_the_pool_does_not_depend_on_the_ranks(teachers: list[Tree], tmp_path: Path) -> None:
    tree = recipes.inversion(teachers, rounds={"main": 2}, out=str(tmp_path / "run"))
    one = measured(0, 1, tree | {"out": str(tmp_path / "one")})
    assert one["overall"]["images"] == 18
    for found in run_ranks(measured, 4, tree):
        assert not {k: v for k, v in running.differences(one, found).items() if v > CLOSE}


def make_pool(rank: int, size: int, tree: Tree, out: str) -> int:
    """`dfkd synthesize` on ranks."""
    return synthesize(parse(Recipe, tree), Path(out), running.anew(), device="cpu")[0]


def test_a_pool_is_the_same_from_any_ranks(teachers: list[Tree], tmp_path: Path) -> None:
    tree = recipes.inversion(teachers, rounds={"main": 2}, source={"synthesis": {"loss": {"js": 0.0}}})
    assert make_pool(0, 1, tree, str(tmp_path / "one")) == 0
    assert run_ranks(make_pool, 4, tree, str(tmp_path / "four")) == [0] * 4
    one, four = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.suffix in (".tar", ".json")}
        for out in ("one", "four")
    )
    assert one == four and len(one) == 9 + 2
    facts = [load_file(tmp_path / out / TARGETS) for out in ("one", "four")]
    assert not {k: v for k, v in running.differences(*facts).items() if v > CLOSE}


# ---------------------------------------------------------------------------------------------- its plan


def counted(rank: int, size: int, tree: Tree) -> list[dict[str, Count]]:
    """What the interceptor saw in the first and in the last round."""
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    rounds: list[dict[str, Count]] = []
    with Interceptor() as seen:
        built.trainer.hooks.after_round = lambda done: rounds.append(seen.take())
        built.trainer.fit()
    return [rounds[0], rounds[-1]]


@pytest.mark.parametrize("targets", ["asked", "stored"])
@pytest.mark.parametrize(("count", "size"), [(2, 2), (1, 2), (2, 4)])
def test_the_plan_knows_its_traffic(count: int, size: int, targets: str, teachers: list[Tree], tmp_path: Path) -> None:
    changes = {"rounds": {"main": 2}, "source": {"pool": {"targets": targets, "memory_gb": 1.0, "shard": 1000}}}
    tree = recipes.inversion(teachers[:count], out=str(tmp_path / "run"), **changes)
    planned, seen = plan(parse(Recipe, tree), size), run_ranks(counted, size, tree)
    for rank, rounds in enumerate(seen):
        traffic = planned.role_of(rank).traffic
        assert [by_collective(traffic[kind]) for kind in (WARM_UP, MAIN)] == rounds
    assert {"synthesis 1", "synthesis 2", "harvest", "student"} <= set(planned.roles[0].flops[MAIN])
    assert sum(role.student_images * role.ranks for role in planned.roles) == 11
    assert sum(role.update_images * role.ranks * len(role.teachers) for role in planned.roles) == 7 * count


# ---------------------------------------------------------------------------------------------- resuming

# Inside the second stage; after the harvest; before the next one; between two student steps; in the last round.
STOPS = [
    (3, "round_00000000_0003"),
    (3, "round_00000000_0006"),
    (5, "round_00000001_0005"),
    (2, "round_00000001_0007"),
    (19, "round_00000004_0002"),
]
KEPT: Tree = {"checkpoint": {"every": 0, "keep": 50}, "log": {"every": 2, "grids": False}}


def _trees(teachers: list[Tree], folder: Path, **changes: Any) -> tuple[Tree, Tree]:
    tree = recipes.merged(recipes.inversion(teachers, **KEPT), changes)
    return tree | {"out": str(folder / "whole")}, tree | {"out": str(folder / "parts")}


def _pool_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pool").iterdir())}


@pytest.mark.parametrize(("count", "size"), [(2, 1), (1, 2), (2, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted(count: int, size: int, teachers: list[Tree], tmp_path: Path) -> None:
    changes = {
        "precision": {"train": "fp32", "teacher": "fp32"},
        "source": {"synthesis": {"keep": "best"}, "pool": {"targets": "stored"}},
    }
    whole, parts = _trees(teachers[:count], tmp_path, **changes)
    legs = [Leg(whole), *[Leg(parts, stop_at) for stop_at, _ in STOPS], Leg(parts)]
    codes = run_ranks(running.travel, size, legs) if size > 1 else [running.travel(0, 1, legs)]
    assert codes == [[0] + [EXIT_STOPPED] * len(STOPS) + [0]] * size
    expected = [position for _, position in STOPS]
    assert running.saved(tmp_path / "parts") == [*expected, *running.saved(tmp_path / "whole")]
    assert not running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert running.metrics(tmp_path / "whole") == running.metrics(tmp_path / "parts")
    assert _pool_files(tmp_path / "whole") == _pool_files(tmp_path / "parts")
    weights = [(tmp_path / out / "student.safetensors").read_bytes() for out in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_run_can_go_on_with_other_ranks(teachers: list[Tree], tmp_path: Path) -> None:
    """Inside a stage from four ranks to two, then to three, then to one."""
    whole, parts = _trees(teachers, tmp_path, source={"synthesis": {"keep": "best"}})
    assert running.travel(0, 1, [Leg(whole)]) == [0]
    for size, steps in ((4, 4), (2, 6), (3, 14)):
        assert run_ranks(running.travel, size, [Leg(parts, steps)]) == [[EXIT_STOPPED]] * size
    assert running.saved(tmp_path / "parts") == [
        "round_00000000_0004", "round_00000001_0004", "round_00000003_0002",
    ]  # fmt: skip
    assert running.travel(0, 1, [Leg(parts)]) == [0]
    one, other = ([running.state(tmp_path / out), running.metrics(tmp_path / out)] for out in ("whole", "parts"))
    found = running.differences(one, other)
    assert all(value < CLOSE for value in found.values()), found
    assert _pool_files(tmp_path / "whole") == _pool_files(tmp_path / "parts")


def test_a_kill_between_shards_and_checkpoint_costs_the_rounds_since(teachers: list[Tree], tmp_path: Path) -> None:
    """A rank dies in the fourth round, after its harvest; the checkpoint is of the second."""
    whole, parts = _trees(teachers, tmp_path, checkpoint={"every": 2, "keep": 2})
    assert run_ranks(running.travel, 2, [Leg(whole)]) == [[0]] * 2
    ranks = start_ranks(running.die, 2, parts, 1, "kill", 6 + 8 + 8 + 7)
    try:
        codes = [rank.exit_code(60.0) for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()
    assert codes == [EXIT_LOST_RANK, -9]
    assert running.saved(tmp_path / "parts") == ["round_00000002_0000"]
    before, images = running.state(tmp_path / "parts")["source/pool"], 4 * 14
    assert len(before["shards"]) == 2 * 14 // 5 < len(list((tmp_path / "parts" / "pool").glob("*.tar"))) == images // 5
    assert run_ranks(running.travel, 2, [Leg(parts)]) == [[0]] * 2
    assert not running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert _pool_files(tmp_path / "whole") == _pool_files(tmp_path / "parts")
