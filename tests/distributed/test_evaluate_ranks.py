"""Evaluation and quality on real ranks: the same everywhere and at every world size, each image once per network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.config import Recipe, SplitSpec, parse
from dfkd_dist.data.datasets import MemoryImageSet
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.evaluate import Evaluation, evaluate
from dfkd_dist.engine.flops import Cost, network_costs
from dfkd_dist.engine.quality import SYNTHETIC, Quality, measure
from tests.distributed.harness import run_ranks
from tests.recipes import Tree, dfmf, write_teachers
from tests.voters import image_set, speak_up

pytestmark = pytest.mark.distributed

COUNT, BATCH, PER_GENERATOR = 45, 11, 7
"""No multiple of anything, and a last batch of one image: fewer than there are columns or rows."""


@dataclass
class Found:
    whole: Evaluation
    alone: Evaluation
    quality: dict[str, Quality]
    costs: dict[str, Cost]
    seen: dict[str, int] = field(default_factory=dict)
    """Images of the set that went through each network on this rank."""


def _count(built: Build, seen: dict[str, int]) -> None:
    """Count non-empty images (the padding is all zeros) that enter each network on this rank."""

    def note(name: str, args: tuple[Any, ...]) -> None:
        seen[name] = seen.get(name, 0) + int((args[0].flatten(1).amax(dim=1) > 0).sum())

    for network in [*built.teachers, built.side.network]:
        network.register_forward_pre_hook(lambda _, args, name=network.name: note(name, args))


def _measure(rank: int, size: int, tree: Tree, empty_tail: bool) -> Found:
    built = speak_up(build(parse(Recipe, tree), torch.device("cpu"), size))
    quality, costs = measure(built, per_generator=PER_GENERATOR, batch=3), network_costs(built)
    images = image_set(COUNT)
    if empty_tail:
        images = MemoryImageSet(images.images_NCHW[:34], images.labels_N[:34], images.classes)
    alone = evaluate(built, images, "val", batch=BATCH, parties=None, student_only=True)
    seen: dict[str, int] = {}
    _count(built, seen)
    parties = SplitSpec(mode="ibl", parties=2, ratio=2.0)
    return Found(evaluate(built, images, "test", batch=BATCH, parties=parties), alone, quality, costs, seen)


@pytest.mark.parametrize("teachers", [2, 3])
def test_results_do_not_depend_on_the_ranks(tmp_path: Path, teachers: int) -> None:
    tree = dfmf(write_teachers(tmp_path, teachers))
    reference = run_ranks(_measure, 1, tree, False)[0]
    assert len({round(value, 6) for _, value in reference.whole.items()}) > 4  # something can differ
    for size in (2, 3, 4):
        found = run_ranks(_measure, size, tree, False)
        for one in found:
            assert one.whole == reference.whole and one.alone == reference.alone and one.costs == reference.costs
            _same_quality(one.quality[SYNTHETIC], reference.quality[SYNTHETIC])
            assert one.quality == found[0].quality
        _each_image_once(found, teachers)


def _same_quality(found: Quality, expected: Quality) -> None:
    for one, other in zip([found.overall, *found.by_class], [expected.overall, *expected.by_class], strict=True):
        assert (one.images, one.agreement) == (other.images, other.agreement)
        assert one.kl == (None if other.kl is None else pytest.approx(other.kl, rel=1e-9, abs=1e-12))


def _each_image_once(found: list[Found], teachers: int) -> None:
    total: dict[str, int] = {}
    for one in found:
        for name, count in one.seen.items():
            total[name] = total.get(name, 0) + count
    assert total == {"student": COUNT} | {f"t{k}": COUNT for k in range(teachers)}


def test_a_column_may_be_left_without_images(tmp_path: Path) -> None:
    # 34 = 3 x 11 + 1: with two columns the first has none of the last batch.
    tree = dfmf(write_teachers(tmp_path, 2))
    reference, *_ = run_ranks(_measure, 1, tree, True)
    assert all(one.whole == reference.whole for one in run_ranks(_measure, 4, tree, True))
