"""Segmentation on gloo ranks: the same answer as one process, and evaluations in which each image counts once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine.build import build
from dfkd_dist.engine.evaluate import Evaluation, evaluate
from dfkd_dist.engine.quality import SYNTHETIC, Quality, measure
from tests import recipes, shards
from tests.distributed import playing
from tests.distributed.harness import run_ranks
from tests.distributed.playing import Result, Tree
from tests.segmentation import dafl, dfad, kd, mask_set, supervised, write_shapes, write_teachers

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
GAMES: dict[str, Callable[..., Tree]] = {"dfad": dfad, "dafl": dafl}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return write_teachers(tmp_path_factory.mktemp("segmenters"), 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", train=40, test=10)


@pytest.fixture(scope="module")
def alone() -> Callable[[Tree], Result]:
    known: dict[str, Result] = {}

    def result(tree: Tree) -> Result:
        if repr(tree) not in known:
            known[repr(tree)] = playing.train(0, 1, tree)
        return known[repr(tree)]

    return result


@pytest.mark.parametrize(("game", "count", "size"), [("dfad", 1, 2), ("dfad", 2, 2), ("dafl", 1, 2), ("dafl", 2, 3)])
def test_data_free_segmentation_equals_one_process(
    game: str, count: int, size: int, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = GAMES[game](teachers[:count])
    single, ranks = alone(tree), run_ranks(playing.train, size, tree)
    found = playing.worst(single, ranks)
    images = [playing.image_gradients(single, ranks, which) for which in (0, -1)]
    print(f"{game} W={size}: {found}, image gradients {images}")
    assert max(found.values()) < CLOSE and images[0] < 1e-12 and images[1] < CLOSE


@pytest.mark.parametrize("size", [2, 3])
def test_pixel_wise_kd_equals_one_process(
    size: int, root: Path, teachers: list[Tree], alone: Callable[[Tree], Result]
) -> None:
    tree = kd(root, teachers)
    assert max(playing.worst(alone(tree), run_ranks(playing.train, size, tree)).values()) < CLOSE


def test_labels_of_pixels_equal_one_process(root: Path, alone: Callable[[Tree], Result]) -> None:
    """Unequal numbers of valid pixels on the ranks: turned, moved and cut labels, and rows that are ignored."""
    tree = supervised(root, image={"size": 12, "channels": 3}, source={"crop": 12}, rounds={"main": 6})
    found = playing.worst(alone(tree), run_ranks(playing.train, 2, tree))
    print(found)
    assert max(found.values()) < CLOSE


@pytest.mark.parametrize("sabotage", ["local bce", "bce gradient counted by each rank", "local batch norm"])
def test_the_comparison_notices(sabotage: str, teachers: list[Tree], alone: Callable[[Tree], Result]) -> None:
    """DFAD's -log(L1 + 1) is of the mean over all ranks, and each rank has the gradient of its own images alone."""
    tree = dfad(teachers[:1])
    found = playing.worst(alone(tree), run_ranks(playing.train, 2, tree, sabotage))
    print(f"{sabotage}: {found}")
    # Adam does not see the scale of a gradient, its moments do.
    assert max(found["states"], found["momenta"]) > DIFFERENT


def _measure(rank: int, size: int, tree: Tree) -> tuple[Evaluation, dict[str, Quality]]:
    built = build(parse(Recipe, tree), torch.device("cpu"), size)
    found = evaluate(built, mask_set(11), "test", batch=5, parties=None)
    return found, measure(built, per_generator=5, batch=3)


@pytest.mark.parametrize("count", [1, 2])
def test_overlaps_do_not_depend_on_the_ranks(count: int, teachers: list[Tree]) -> None:
    """A last batch of one image leaves some ranks without any; the confusions of all add up."""
    tree: dict[str, Any] = dafl(teachers[:count])
    ((reference, quality),) = run_ranks(_measure, 1, tree)
    assert reference.samples == 11 and 0 < reference.overlaps["teacher/t0"].miou < 100
    for size in (2, 3):
        for found, measured in run_ranks(_measure, size, tree):
            assert found == reference
            one, other = measured[SYNTHETIC].overall, quality[SYNTHETIC].overall
            assert (one.images, one.agreement) == (other.images, other.agreement)
            assert one.kl == pytest.approx(other.kl, rel=1e-9)


def test_mosaickd_on_pixels_equals_one_process(tmp_path: Path, teachers: list[Tree]) -> None:
    tree = recipes.mosaic(teachers[:1], shards.write_shards(tmp_path / "shards"), out=str(tmp_path / "run"))
    tree = recipes.merged(tree, {"student": {"arch": "tinyseg"}, "rounds": {"main": 3, "student_steps": 1}})
    single, ranks = playing.train(0, 1, tree), run_ranks(playing.train, 2, tree)
    found = playing.worst(single, ranks)
    print(found)
    assert max(found.values()) < CLOSE and playing.image_gradients(single, ranks, 0) < 1e-12
