"""The same answer at any world size: gloo ranks against one process, and controls that must come out different."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import recipes
from tests.distributed import playing
from tests.distributed.harness import run_ranks
from tests.distributed.playing import Result, Tree

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
FEW: Tree = {"rounds": {"warmup": 1, "main": 3, "student_steps": 1}}
GAMES: dict[str, Callable[..., Tree]] = {
    "dfmf": recipes.dfmf,
    "dfq-eval": recipes.dfq,
    "dfq-batch": partial(recipes.dfq, batch_norm="batch"),
}
OTHERS: dict[str, Callable[..., Tree]] = {"dafl": recipes.dafl, "zskt": recipes.zskt, "dfad": recipes.dfad}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 3)


@pytest.fixture(scope="module")
def alone() -> Callable[[Tree], Result]:
    """One process's result, computed once for each recipe."""
    known: dict[str, Result] = {}

    def result(tree: Tree) -> Result:
        if repr(tree) not in known:
            known[repr(tree)] = playing.train(0, 1, tree)
        return known[repr(tree)]

    return result


def assert_equal_to_one(single: Result, ranks: list[Result]) -> None:
    found = playing.worst(single, ranks)
    first, last = (playing.image_gradients(single, ranks, which) for which in (0, -1))
    print(f"W={len(ranks)}: {found}, image gradients {first:.1e} at first and {last:.1e} at last")
    assert max(found.values()) < CLOSE
    assert first < 1e-12 and last < CLOSE
    assert_replicas_are_bit_equal(ranks)


def assert_replicas_are_bit_equal(ranks: list[Result]) -> None:
    first: dict[str, dict[str, Tensor]] = {}
    for result in ranks:
        for player, state in result["states"].items():
            for name, value in state.items():
                assert torch.equal(value, first.setdefault(player, state)[name]), f"replicas of {player} differ: {name}"


LAYOUTS = [(1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)]
# Batch mode talks inside rows only, so one layout of every kind of row is enough.
PLAYED = [(game, *layout) for game in ("dfmf", "dfq-eval") for layout in LAYOUTS]
PLAYED += [("dfq-batch", 1, 4), ("dfq-batch", 2, 3), ("dfq-batch", 3, 2), ("dfq-batch", 3, 4)]


@pytest.mark.parametrize(("game", "count", "size"), PLAYED)
def test_twenty_rounds_equal_those_of_one_process(
    game: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = GAMES[game](teachers[:count])
    assert_equal_to_one(alone(tree), run_ranks(playing.train, size, tree))


@pytest.mark.parametrize("game", OTHERS)
@pytest.mark.parametrize(("count", "size"), [(1, 2), (3, 4)])
def test_other_methods_equal_those_of_one_process(
    game: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = OTHERS[game](teachers[:count])
    assert_equal_to_one(alone(tree), run_ranks(playing.train, size, tree))


@pytest.mark.parametrize(("game", "count", "batch"), [("dfmf", 3, 3), ("dfq-batch", 1, 3), ("dafl", 3, 3)])
def test_ranks_without_images_take_part(
    game: str, count: int, batch: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = (GAMES | OTHERS)[game](teachers[:count], batch=batch, **FEW)
    assert_equal_to_one(alone(tree), run_ranks(playing.train, 4, tree))


@pytest.mark.parametrize(("bn", "form"), [("sum", "log_l1"), ("mean", "masked_kl")])
def test_other_forms_of_the_terms(bn: str, form: str, teachers: list[Tree], alone: Callable[[Tree], Result]) -> None:
    source = {"bn": {"form": "gaussian_kl", "channels": bn}, "adversary": {"form": form}}
    tree = recipes.dfq(teachers[:1], "batch", source=source, **FEW)
    assert_equal_to_one(alone(tree), run_ranks(playing.train, 3, tree))


def test_a_labelled_source_equals_one_process(tmp_path: Path, alone: Callable[[Tree], Result]) -> None:
    tree = recipes.labelled(tmp_path)
    single, ranks = alone(tree), run_ranks(playing.train, 3, tree)
    assert max(playing.worst(single, ranks).values()) < CLOSE


def test_training_moves_everything_that_is_compared(teachers: list[Tree], alone: Callable[[Tree], Result]) -> None:
    one, more = (recipes.dfmf(teachers[:2], rounds={"warmup": 2, "main": main}) for main in (1, 18))
    before, after = alone(one)["states"], alone(more)["states"]
    for player, state in after.items():
        for name, value in state.items():
            assert playing.deviation(value, before[player][name]) > 1e-5, f"{player}: {name} stood still"


@pytest.mark.parametrize("size", [2, 4])
def test_first_gradients_in_single_precision(size: int, teachers: list[Tree], alone: Callable[[Tree], Result]) -> None:
    short = {"precision": {"train": "fp32", "teacher": "fp32"}, "rounds": {"warmup": 0, "main": 1, "student_steps": 1}}
    for game in GAMES.values():
        tree = game(teachers[:2], **short)
        single, ranks = alone(tree)["gradients"], run_ranks(playing.train, size, tree)
        for result in ranks:
            for player, gradient in result["gradients"].items():
                off = playing.deviation(gradient, single[player]) / float(single[player].abs().max())
                print(f"W={size} {player}: {off:.1e}")
                assert off < 1e-4, player


# ------------------------------------------------------------------------------------- negative controls

BREAKS = [
    ("only own column", "dfq-eval", 2),
    ("answers to other images", "dfmf", 2),
    ("rank indices", "dfmf", 1),
    ("gradients of a row stay", "dfmf", 1),
    ("local batch norm", "dfq-eval", 1),
    ("local bn term", "dfq-eval", 1),
    ("local bce", "dfq-eval", 1),
    ("bce gradient counted by each rank", "dfq-eval", 1),
    ("readers move buffers", "dfq-eval", 1),
]


@pytest.mark.parametrize(("sabotage", "game", "count"), BREAKS)
def test_the_comparison_notices(
    sabotage: str, game: str, count: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    """On two ranks: two rows of one where there are two teachers, one row of two where there is one."""
    tree = GAMES[game](teachers[:count], **FEW)
    found = playing.worst(alone(tree), run_ranks(playing.train, 2, tree, sabotage))
    print(f"{sabotage}: {found}")
    assert found["states"] > DIFFERENT and found["losses"] > DIFFERENT


@pytest.mark.parametrize(("game", "count", "size"), [("dfmf", 2, 4), ("dfq-eval", 1, 2), ("dfq-batch", 1, 2)])
def test_local_synchronisation_is_another_method(
    game: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = GAMES[game](teachers[:count], **FEW)
    ranks = run_ranks(playing.train, size, tree | {"mesh": {"sync": "local"}})
    found = playing.worst(alone(tree), ranks)
    print(f"local {game}: {found}")
    assert found["states"] > DIFFERENT and found["losses"] > DIFFERENT
    assert playing.image_gradients(alone(tree), ranks, 0) > DIFFERENT


def test_the_deal_matters_only_where_batch_norm_is_local(teachers: list[Tree], alone: Callable[[Tree], Result]) -> None:
    tree = recipes.dfq(teachers[:2], **FEW)
    assert_equal_to_one(alone(tree), run_ranks(playing.train, 2, tree, "deal by row"))
    local = tree | {"mesh": {"sync": "local"}}
    mixed, own = (run_ranks(playing.train, 2, local, sabotage) for sabotage in ("", "deal by row"))
    assert playing.worst(mixed[0], own[:1])["states"] > DIFFERENT


# ---------------------------------------------------------------------------------------- who holds what


@pytest.mark.parametrize(("size", "rows"), [(2, [["t2"], ["t0", "t1"]]), (3, [["t2"], ["t1"], ["t0"]])])
def test_a_rank_holds_the_teachers_of_its_row_and_nothing_of_the_others(
    size: int, rows: list[list[str]], teachers: list[Tree]
) -> None:
    tree = recipes.dfmf(teachers)
    ((_, _, parameters),) = [playing.holdings(0, 1, tree)]
    told = run_ranks(playing.holdings, size, tree)
    for row, (held, players, _) in zip(rows, told, strict=True):
        assert held == row
        own = {f"{part}/{name}" for part in ("generator", "assistant") for name in row}
        assert set(players) == {"student"} | own
    assert sum(count for _, _, count in told) == parameters
