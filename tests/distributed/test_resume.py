"""A run that was stopped and resumed is the run that was not: bit by bit on the same ranks, nearly so on others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dfkd_dist.engine.metrics import Meters
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import EXIT_STOPPED
from tests import recipes
from tests.distributed import running
from tests.distributed.harness import run_ranks
from tests.distributed.running import Leg, Tree

pytestmark = pytest.mark.distributed

CLOSE = 1e-9
SINGLE: Tree = {"train": "fp32", "teacher": "fp32"}
KEEP_ALL: Tree = {"every": 0, "keep": 50}
# Windows of metrics that no stop respects.
LOG: Tree = {"every": 2, "grids": False}


def _dfmf(folder: Path, count: int) -> Tree:
    """Per round a step of the generators, one of the assistants and two of the student; the first round warms up."""
    rounds = {"warmup": 1, "main": 4, "student_steps": 2}
    return recipes.dfmf(recipes.write_teachers(folder, count), rounds=rounds)


def _dafl(folder: Path, count: int) -> Tree:
    return recipes.dafl(recipes.write_teachers(folder, count), rounds={"warmup": 0, "main": 4, "student_steps": 2})


def _zskt(folder: Path, count: int) -> Tree:
    return recipes.zskt(recipes.write_teachers(folder, count), rounds={"warmup": 0, "main": 3, "student_steps": 3})


def _labelled(folder: Path, count: int) -> Tree:
    return recipes.labelled(folder, rounds={"main": 7})


MAKERS: dict[str, Callable[[Path, int], Tree]] = {
    "dfmf": _dfmf, "dafl": _dafl, "zskt": _zskt, "labelled": _labelled,
}  # fmt: skip

# Steps of each leg, and the position (round, steps in it) where it must have stopped.
STOPS: dict[str, list[tuple[int, str]]] = {
    # The end of the warm-up; the end of a main round; after a generator's step; between two student steps.
    "dfmf": [
        (1, "round_00000000_0001"),
        (4, "round_00000001_0004"),
        (1, "round_00000002_0001"),
        (2, "round_00000002_0003"),
    ],
    # Between the step that made the images and the student's that uses them; then between two uses.
    "dafl": [(4, "round_00000001_0001"), (1, "round_00000001_0002")],
    "zskt": [(1, "round_00000000_0001"), (2, "round_00000000_0003"), (3, "round_00000001_0002")],
    "labelled": [(3, "round_00000002_0001")],
}


def _legs(tree: Tree, stops: list[tuple[int, str]]) -> list[Leg]:
    return [Leg(tree, stop_at) for stop_at, _ in stops] + [Leg(tree)]


def _trees(tree: Tree, folder: Path) -> tuple[Tree, Tree]:
    """The same recipe for an uninterrupted and for an interrupted run."""
    tree = recipes.merged(tree, {"checkpoint": KEEP_ALL, "log": LOG})
    return tree | {"out": str(folder / "whole")}, tree | {"out": str(folder / "parts")}


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("dfmf", 2, 1),
        ("dfmf", 2, 2),
        ("dfmf", 2, 4),
        ("dafl", 2, 1),
        # One row of two ranks, so that the images kept are spread over ranks.
        ("dafl", 1, 2),
        pytest.param("dafl", 2, 4, marks=pytest.mark.slow),
        ("zskt", 2, 1),
        pytest.param("zskt", 2, 2, marks=pytest.mark.slow),
        ("labelled", 0, 1),
        pytest.param("labelled", 0, 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(name: str, count: int, size: int, tmp_path: Path) -> None:
    tree = recipes.merged(MAKERS[name](tmp_path, count), {"precision": SINGLE})
    whole, parts = _trees(tree, tmp_path)
    legs = [Leg(whole), *_legs(parts, STOPS[name])]
    codes = run_ranks(running.travel, size, legs) if size > 1 else [running.travel(0, 1, legs)]
    assert codes == [[0] + [EXIT_STOPPED] * len(STOPS[name]) + [0]] * size
    expected = [position for _, position in STOPS[name]]
    assert running.saved(tmp_path / "parts") == [*expected, *running.saved(tmp_path / "whole")]
    assert not running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert running.metrics(tmp_path / "whole") == running.metrics(tmp_path / "parts")
    weights = [(tmp_path / out / "student.safetensors").read_bytes() for out in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["dfmf", pytest.param("dafl", marks=pytest.mark.slow)])
def test_a_run_can_go_on_with_fewer_ranks(name: str, tmp_path: Path) -> None:
    whole, parts = _trees(MAKERS[name](tmp_path, 2), tmp_path)
    assert running.travel(0, 1, [Leg(whole)]) == [0]
    *steps, second = [steps for steps, _ in STOPS[name]]
    first = sum(steps)
    assert run_ranks(running.travel, 4, [Leg(parts, first)]) == [[EXIT_STOPPED]] * 4
    assert run_ranks(running.travel, 2, [Leg(parts, second)]) == [[EXIT_STOPPED]] * 2
    assert running.travel(0, 1, [Leg(parts)]) == [0]
    one, other = ([running.state(tmp_path / out), running.metrics(tmp_path / out)] for out in ("whole", "parts"))
    found = running.differences(one, other)
    print(f"{name}: at most {max(found.values()):.1e}")
    assert all(value < CLOSE for value in found.values()), found


def test_a_resumed_run_can_be_resumed_after_its_end(tmp_path: Path) -> None:
    tree, _ = _trees(recipes.merged(_labelled(tmp_path, 0), {"precision": SINGLE}), tmp_path)
    assert running.travel(0, 1, [Leg(tree)]) == [0]
    before = running.state(tmp_path / "whole"), running.metrics(tmp_path / "whole"), running.saved(tmp_path / "whole")
    assert running.travel(0, 1, [Leg(tree)]) == [0]
    after = running.state(tmp_path / "whole"), running.metrics(tmp_path / "whole"), running.saved(tmp_path / "whole")
    assert not running.differences(list(before), list(after))


# ------------------------------------------------------------------------------------- negative controls


def _without_optimizer(self: Player, state: Tree) -> None:
    self.module.load_state_dict(state["module"])
    self.steps = state["steps"]


def _without_schedule(self: Player, state: Tree) -> None:
    self.module.load_state_dict(state["module"])
    self.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("broken", [_without_optimizer, _without_schedule])
def test_the_comparison_notices(broken: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: Tree = {"precision": SINGLE, "schedule": {"kind": "cosine"}}
    whole, parts = _trees(recipes.merged(_labelled(tmp_path, 0), changes), tmp_path)
    assert running.travel(0, 1, [Leg(whole)]) == [0]
    monkeypatch.setattr(Player, "load_state_dict", broken)
    assert running.travel(0, 1, [Leg(parts, 3), Leg(parts)]) == [EXIT_STOPPED, 0]
    found = running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    assert any(place.startswith("/student/module") for place in found)


def test_the_comparison_of_metrics_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = _trees(recipes.merged(_labelled(tmp_path, 0), {"precision": SINGLE}), tmp_path)
    assert running.travel(0, 1, [Leg(whole)]) == [0]
    monkeypatch.setattr(Meters, "load_state_dicts", lambda self, states, world: None)
    assert running.travel(0, 1, [Leg(parts, 3), Leg(parts)]) == [EXIT_STOPPED, 0]
    assert running.metrics(tmp_path / "whole") != running.metrics(tmp_path / "parts")


def test_differences_are_found_anywhere() -> None:
    one = {"a": [torch.zeros(2), {"b": 1.0}], "c": 3}
    assert not running.differences(one, {"a": [torch.zeros(2), {"b": 1.0}], "c": 3})
    assert running.differences(one, {"a": [torch.tensor([0.0, 2.0]), {"b": 1.5}], "c": 3}) == {
        "/a/0": 2.0,
        "/a/1/b": 0.5,
    }
    assert list(running.differences(one, {"a": [torch.zeros(3), {"b": 1.0}], "c": 3})) == ["/a/0"]
    assert list(running.differences(one, {"a": one["a"]})) == ["/c"]
