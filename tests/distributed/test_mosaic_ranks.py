"""MosaicKD at any world size and after any stop: gloo ranks against one process, and controls that must differ."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.config import Recipe, parse
from dfkd_dist.data.stream.batch import RawBatch
from dfkd_dist.engine import build_mosaic
from dfkd_dist.engine.build import build
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_trace import MAIN, by_collective
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.interceptor import Count, Interceptor
from dfkd_dist.parallel.stopping import EXIT_STOPPED
from dfkd_dist.sources import mosaic
from dfkd_dist.sources.stream import StreamReader
from tests import recipes, shards
from tests.distributed import playing, running
from tests.distributed.harness import run_ranks
from tests.distributed.playing import Result, Tree
from tests.distributed.running import Leg
from tests.distributed.test_equivalence import DIFFERENT, assert_equal_to_one

pytestmark = pytest.mark.distributed

FEW: Tree = {"rounds": {"main": 3, "student_steps": 1}}
# Another patch size and form, the released code's options, and nothing real for the student.
VARIANTS: dict[str, Tree] = {
    "paper": {"source": {"ood_batch": 0}},
    "released": {"source": {"discriminator": {"field": 4, "stride": 2, "reduction": "sum", "images": "generator"}}},
    "saturating": {
        "source": {
            "discriminator": {"field": "image", "form": "saturating", "batch_norm": "eval"},
            "warmup_loss": {"patch": 1.0, "ice": 1.0},
        },
        "rounds": {"warmup": 2},
    },
    "selected": {"source": {"selection": {"kind": "top", "score": "entropy", "count": 30, "batch": 8}}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tree]:
    """A recipe over teachers and shards that are written once."""
    folder = tmp_path_factory.mktemp("mosaic")
    pictures: list[torch.Tensor | bytes] = [*shards.small_pictures(43)]
    pictures[5], pictures[30] = b"no picture", b"none either"  # their slots are left out, so counts vary
    teachers, images = recipes.write_teachers(folder, 2), shards.write_shards(folder / "shards", pictures)

    def make(count: int, **changes: Any) -> Tree:
        tree = recipes.mosaic(teachers[:count], images, **{"out": str(folder / "run"), **changes})
        return recipes.merged(tree, {"source": {"reader": {"bad_limit": 1.0}}})

    return make


@pytest.fixture(scope="module")
def alone() -> Callable[[Tree], Result]:
    """One process's result, computed once for each recipe."""
    known: dict[str, Result] = {}

    def result(tree: Tree) -> Result:
        if repr(tree) not in known:
            known[repr(tree)] = playing.train(0, 1, tree)
        return known[repr(tree)]

    return result


@pytest.mark.parametrize(
    ("count", "size"), [(1, 2), (1, 4), (2, 2), (2, 4), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_the_game_equals_one_process(
    count: int, size: int, made: Callable[..., Tree], alone: Callable[[Tree], Result]
) -> None:
    """20 rounds; all players' weights, buffers and moments, and the student's on every rank bit for bit."""
    tree = made(count)
    ranks = run_ranks(playing.train, size, tree)
    assert_equal_to_one(alone(tree), ranks)
    players = {"student"} | {f"{part}/t{k}" for part in ("generator", "discriminator") for k in range(count)}
    assert alone(tree)["states"].keys() == players


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_variants_equal_one_process(
    variant: str, made: Callable[..., Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = recipes.merged(made(2, rounds={"main": 5}), VARIANTS[variant])
    assert_equal_to_one(alone(tree), run_ranks(playing.train, 4, tree))


def test_training_moves_every_player(made: Callable[..., Tree], alone: Callable[[Tree], Result]) -> None:
    before, after = (alone(made(1, rounds={"main": main}))["states"] for main in (1, 20))
    for player, state in after.items():
        for name, value in state.items():
            assert playing.deviation(value, before[player][name]) > 1e-5, f"{player}: {name} stood still"


# ------------------------------------------------------------------------------------- negative controls


def _local_discriminator_norm() -> None:
    build_mosaic.synchronise = lambda module, group: synchronise(module, ALONE)  # type: ignore[assignment]


def _discriminator_moves_in_generator_step() -> None:
    mosaic.reading_only = lambda module, mode, group=ALONE: nullcontext()  # type: ignore[assignment]


def _own_count_of_real_images() -> None:
    agreed = StreamReader._agreed

    def local(self: StreamReader, epoch: int, g: int) -> tuple[RawBatch, int]:
        raw, _ = agreed(self, epoch, g)
        return raw, int(raw.valid_N.sum())

    StreamReader._agreed = local  # type: ignore[method-assign]


def _the_same_real_images_on_every_rank() -> None:
    plain = build_mosaic.stream_reader

    def first_slots(*args: Any) -> StreamReader:
        reader = plain(*args)
        alone = plain(*args[:4], ALONE, *args[5:])

        def get(epoch: int, g: int) -> RawBatch:
            raw, n = alone.stream.get(epoch, g), len(reader_get(epoch, g).slots_N)
            parts = (raw.images_NCHW, raw.valid_N, raw.slots_N, raw.ids_N, raw.labels_N)
            return RawBatch(*[part[:n] for part in parts], bad=[])

        reader_get, reader.stream.get = reader.stream.get, get  # type: ignore[method-assign]
        return reader

    build_mosaic.stream_reader = first_slots


BREAKS: dict[str, Callable[[], None]] = {
    "local discriminator norm": _local_discriminator_norm,
    "discriminator moves in generator step": _discriminator_moves_in_generator_step,
    "own count of real images": _own_count_of_real_images,
    "the same real images on every rank": _the_same_real_images_on_every_rank,
}


def broken(rank: int, size: int, tree: Tree, how: str) -> Result:
    """Train with something broken."""
    BREAKS[how]()
    return playing.train(rank, size, tree)


@pytest.mark.parametrize("how", BREAKS)
def test_the_comparison_notices(how: str, made: Callable[..., Tree], alone: Callable[[Tree], Result]) -> None:
    tree = made(1, **FEW)
    found = playing.worst(alone(tree), run_ranks(broken, 2, tree, how))
    print(f"{how}: {found}")
    assert found["states"] > DIFFERENT
    # What moves its buffers alone shows in no loss: it is asked with the batch's own statistics.
    assert (found["losses"] > DIFFERENT) == (how != "discriminator moves in generator step")


def test_local_synchronisation_is_another_method(made: Callable[..., Tree], alone: Callable[[Tree], Result]) -> None:
    tree = made(1, **FEW)
    found = playing.worst(alone(tree), run_ranks(playing.train, 2, tree | {"mesh": {"sync": "local"}}))
    assert found["states"] > DIFFERENT and found["losses"] > DIFFERENT


# ---------------------------------------------------------------------------------------------- its plan


def counted(rank: int, size: int, tree: Tree) -> dict[str, Count]:
    """What the interceptor saw in the last round."""
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    rounds: list[dict[str, Count]] = []
    with Interceptor() as seen:
        built.trainer.hooks.after_round = lambda done: rounds.append(seen.take())
        built.trainer.fit()
    return rounds[-1]


@pytest.mark.parametrize(("count", "size"), [(2, 2), (1, 2), (2, 4)])
def test_the_plan_knows_its_traffic(count: int, size: int, made: Callable[..., Tree]) -> None:
    tree = made(count, rounds={"main": 2})
    planned, seen = plan(parse(Recipe, tree), size), run_ranks(counted, size, tree)
    for rank, found in enumerate(seen):
        assert by_collective(planned.role_of(rank).traffic[MAIN]) == found
    assert {"discriminator", "generator", "exchange", "student"} <= set(planned.roles[0].flops[MAIN])
    assert {"discriminator/t0"} <= {name for role in planned.roles for name in role.networks}
    images = sum(role.student_images * role.ranks for role in planned.roles)
    assert images == count * (11 // count) + 7


# ---------------------------------------------------------------------------------------------- resuming

# After a discriminator's step, in the first and in another round; then between two student steps.
STOPS = [(1, "round_00000000_0001"), (4, "round_00000001_0001"), (2, "round_00000001_0003")]


@pytest.mark.parametrize(("count", "size"), [(2, 1), (1, 2), (2, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted(
    count: int, size: int, made: Callable[..., Tree], tmp_path: Path
) -> None:
    changes = {
        "rounds": {"main": 4, "student_steps": 2},
        "precision": {"train": "fp32", "teacher": "fp32"},
        "checkpoint": {"every": 0, "keep": 50},
        "log": {"every": 2, "grids": False},
    }
    whole, parts = (made(count, **changes, out=str(tmp_path / out)) for out in ("whole", "parts"))
    legs = [Leg(whole), *[Leg(parts, stop_at) for stop_at, _ in STOPS], Leg(parts)]
    codes = run_ranks(running.travel, size, legs) if size > 1 else [running.travel(0, 1, legs)]
    assert codes == [[0] + [EXIT_STOPPED] * len(STOPS) + [0]] * size
    expected = [position for _, position in STOPS]
    assert running.saved(tmp_path / "parts") == [*expected, *running.saved(tmp_path / "whole")]
    assert not running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert running.metrics(tmp_path / "whole") == running.metrics(tmp_path / "parts")
    weights = [(tmp_path / out / "student.safetensors").read_bytes() for out in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_stopped_inside_and_after_a_selection(made: Callable[..., Tree], tmp_path: Path) -> None:
    """Four steps of scoring on two ranks come first; the choice is scored again, or taken from the checkpoint."""
    changes = {
        "rounds": {"main": 3, "student_steps": 2},
        "checkpoint": {"every": 0, "keep": 50},
        "log": {"every": 1, "grids": False},
        "source": VARIANTS["selected"]["source"],
    }
    whole, parts = (recipes.merged(made(2, out=str(tmp_path / out)), changes) for out in ("whole", "parts"))
    stops = [(2, "round_00000000_0002"), (3, "round_00000000_0005"), (4, "round_00000001_0001")]
    legs = [Leg(whole), *[Leg(parts, stop_at) for stop_at, _ in stops], Leg(parts)]
    assert run_ranks(running.travel, 2, legs) == [[0] + [EXIT_STOPPED] * len(stops) + [0]] * 2
    assert running.saved(tmp_path / "parts")[: len(stops)] == [position for _, position in stops]
    assert not running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert running.metrics(tmp_path / "whole") == running.metrics(tmp_path / "parts")
