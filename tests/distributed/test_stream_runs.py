"""Whole runs on a stream with bad samples: the same at any world size, and after being stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dfkd_dist.parallel.stopping import EXIT_STOPPED
from tests import recipes
from tests.distributed import playing, running
from tests.distributed.harness import run_ranks
from tests.distributed.running import Leg, Tree
from tests.shards import encoded, small_pictures, write_shards

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
BROKEN = (3, 22)

GAMES: dict[str, Tree] = {
    "kl, top": {
        "selection": {"kind": "top", "count": 37, "batch": 4},
        "objective": {"kl": 1.0, "at": 1.0},
        "augment": {"flip": True, "crop_padding": 1},
    },
    "noisy, all": {"objective": {"kind": "noisy"}, "fraction": 0.9},
    "crd, balanced": {
        "selection": {"kind": "top", "score": "entropy", "count": 40, "balanced": True, "batch": 4},
        "objective": {"crd": 0.8, "rkd_d": 1.0, "rkd_a": 2.0, "hint": 1.0, "contrast": {"dim": 6, "negatives": 7}},
    },
    "sskd": {"objective": {"kind": "sskd"}},
    "kd3": {
        "selection": {"kind": "kd3", "threshold": 0.1, "batch": 4},
        "objective": {"kind": "kd3", "head": 6, "mdcl": 0.1, "delta": 0.5},
    },
    "kdci": {"compensation": {"kind": "kdci", "size": 3, "hidden": 5}, "objective": {"kl": 1.0}},
}
ONE_TEACHER = ("kd3", "sskd")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 images in 5 unequal shards; two of them are not images."""
    images: list[Any] = [encoded(image, "png") for image in small_pictures(43)]
    for i in BROKEN:
        images[i] = b"no image"
    return write_shards(tmp_path_factory.mktemp("shards") / "set", images)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)


def game(name: str, teachers: list[Tree], shards: Path, folder: Path, **changes: Any) -> Tree:
    """Three epochs over a selected stream."""
    options = dict(GAMES[name])
    count = 1 if name in ONE_TEACHER else 2
    reader = {"shards": str(shards), "workers": 0, "window": 13, "bad_limit": 0.2}
    reader["fraction"] = options.pop("fraction", 1.0)
    source = {"kind": "stream", "reader": reader, "selection": options.pop("selection", None)}
    tree = recipes.base(teachers[:count], rounds={"warmup": 0, "main": 3, "student_steps": "epoch"}, **options)
    del tree["source"]["generator"]
    tree["source"] = source
    schedule = {"kind": "multistep", "milestones": [0.3]}
    tree |= {"out": str(folder), "log": {"grids": False}, "schedule": schedule}
    return recipes.merged(tree, changes)


@pytest.mark.parametrize(
    ("name", "size"), [(name, 2) for name in GAMES] + [("kl, top", 3), ("crd, balanced", 4), ("kd3", 4)]
)
def test_equal_to_one_process(name: str, size: int, teachers: list[Tree], shards: Path, tmp_path: Path) -> None:
    alone = playing.train(0, 1, game(name, teachers, shards, tmp_path / "alone"))
    ranks = run_ranks(playing.train, size, game(name, teachers, shards, tmp_path / "ranks"))
    found = playing.worst(alone, ranks)
    print(name, size, found)
    assert max(found.values()) < CLOSE


@pytest.mark.parametrize("name", ["kl, top", "crd, balanced", "kd3"])
def test_local_synchronisation_is_another_run(name: str, teachers: list[Tree], shards: Path, tmp_path: Path) -> None:
    alone = playing.train(0, 1, game(name, teachers, shards, tmp_path / "alone"))
    local = game(name, teachers, shards, tmp_path / "ranks", mesh={"sync": "local"})
    assert playing.worst(alone, run_ranks(playing.train, 2, local))["states"] > DIFFERENT


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        # 11 chunks are scored, four at a time over the ranks or one by one; then three student steps.
        ("kl, top", [2, 6]),
        ("kd3", [2, 4, 5]),
        ("crd, balanced", [13]),
        ("kdci", [2, 2]),
    ],
)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (4, 2), (2, 1)])
def test_stopped_anywhere_and_resumed(
    name: str, stops: list[int], sizes: tuple[int, int], teachers: list[Tree], shards: Path, tmp_path: Path
) -> None:
    changes: Tree = {"checkpoint": {"every": 0, "keep": 50}, "precision": {"train": "fp64", "teacher": "fp64"}}
    whole = game(name, teachers, shards, tmp_path / "whole", **changes)
    parts = game(name, teachers, shards, tmp_path / "parts", **changes)
    first, second = sizes
    assert run_ranks(running.travel, first, [Leg(whole)]) == [[0]] * first
    legs = [Leg(parts, stop) for stop in stops]
    assert run_ranks(running.travel, first, legs) == [[EXIT_STOPPED] * len(legs)] * first
    assert run_ranks(running.travel, second, [Leg(parts)]) == [[0]] * second
    found = running.differences(running.state(tmp_path / "whole"), running.state(tmp_path / "parts"))
    if first == second:
        assert found == {}
    else:  # sums of losses since the last line of metrics are kept rank by rank
        far = {place: value for place, value in found.items() if not (value < CLOSE or place.startswith("/meters"))}
        assert far == {}
