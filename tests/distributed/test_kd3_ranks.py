"""KD3 at any world size: perturbed images, losses and weights of gloo ranks against those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import KD3Spec, parse
from dfkd_dist.engine.student_side import StudentSide
from dfkd_dist.losses import kd3 as losses
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.shared_classifier import share_classifier
from dfkd_dist.models.signals import FEATURES, LOGITS, Batch
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.objectives import kd3
from dfkd_dist.objectives.registry import Context
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.mesh import world_group
from dfkd_dist.parallel.player import Player, constant
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources import views
from tests import recipes
from tests.distributed import playing
from tests.distributed.harness import run_ranks
from tests.distributed.playing import deviation
from tests.recipes import stir
from tests.shards import PER_SHARD, encoded, small_pictures, write_shards

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
CLASSES, BATCH, STEPS = 5, 11, 20
MISSING = [3, 4, 9]
"""Slots whose images cannot be read."""
BOTH = frozenset({LOGITS, FEATURES})
Result = dict[str, Any]


def play(rank: int, size: int, spec: dict[str, Any], sabotage: str = "", batch: int = BATCH) -> Result:
    """Twenty steps of KD3 on a fixed list of images, this rank holding its slots."""
    if sabotage in SABOTAGE:
        SABOTAGE[sabotage]()
    world, parsed = world_group(rank, size), parse(KD3Spec, {"kind": "kd3", "head": 6, "mdcl": 0.1} | spec)
    teacher, student = networks(parsed)
    synchronise(student, ALONE if sabotage == "local batch norm" else world)
    shapes = {LOGITS: (CLASSES,), FEATURES: (96,)}
    torch.manual_seed(2)
    context = Context([1.0], shapes, [shapes], CLASSES, world=ALONE if sabotage == "local contrast" else world)
    side = StudentSide(student, kd3.KD3(parsed, context).double())
    player = Player("student", side, lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9), constant, STEPS, world)
    partners_of = ALONE if sabotage == "local partners" else world
    maker = views.PartnerViews(parsed.perturb, 0.3, partners_of, Randomness(5), batch)
    everything: dict[str, Tensor] = {}
    gradient = torch.zeros(0)
    for step in range(STEPS):
        low, high = bounds(batch, size, rank)
        slots = torch.tensor([s for s in range(low, high) if s not in MISSING], dtype=torch.int64)
        clean = pictures(step)[slots]
        further = maker(clean, slots, 0, step) if parsed.views > 1 else []
        images = torch.cat([clean, *further])
        count = batch - sum(slot < batch for slot in MISSING)
        block = parsed.views * maker.padded
        found = side(Batch(images, count, slots_N=slots, views=parsed.views, block=block), [teacher(images, BOTH)])
        player.backward(found.total)
        gradient = player.gradient.clone() if step == 0 else gradient
        player.step()
        for name, value in (found.terms | found.report).items():
            everything[f"{step}/{name}"] = world.sum_(value.detach().clone())
        everything |= {
            f"{step}/{slot}": image for slot, image in zip(slots.tolist(), images[len(slots) :], strict=False)
        }
    return {"told": everything, "gradient": gradient, "state": {k: v.clone() for k, v in side.state_dict().items()}}


def networks(spec: KD3Spec) -> tuple[Teacher, ImageNetwork]:
    """Teacher and student at the start."""
    card = Card("tiny", CLASSES, 8, 1, [0.4], [0.3])
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(stir(card.build(), seed))
    teacher = Teacher(made[0], card.preprocess(), "t0").double()
    student = ImageNetwork(made[1], card.preprocess(), "student").double()
    if spec.shares_classifier:
        share_classifier(student, teacher)
    return teacher, student  # type: ignore[return-value]


def pictures(step: int) -> Tensor:
    """Images of all slots."""
    return torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _own_anchors_only() -> None:
    """A usual mistake: a rank adds the terms of its own images only, so it misses how it is a contrast to others."""

    def share(self: kd3.KD3, similarity_MM: Tensor, valid_M: Tensor) -> Tensor:
        values_M = losses.contrast(similarity_MM, self.spec.temperature, self.spec.denominator, valid_M)
        return values_M.chunk(self.world.size)[self.world.rank].sum()

    kd3.KD3._share = share  # type: ignore[method-assign]


def _gradient_divided_by_ranks() -> None:
    """Another: the gradient is averaged as if every rank held all of it."""
    kd3.share_of = lambda value, sync, total: value / total  # type: ignore[assignment]


def _rank_indices() -> None:
    """Every rank draws its partners and lambdas as if its images were the first."""
    call = views.PartnerViews.__call__
    views.PartnerViews.__call__ = lambda self, x, slots, r, s: call(self, x, slots - slots[:1], r, s)  # type: ignore[method-assign]


SABOTAGE: dict[str, Callable[[], None]] = {
    "own anchors only": _own_anchors_only,
    "gradient divided by ranks": _gradient_divided_by_ranks,
    "rank indices": _rank_indices,
}


def worst(alone: Result, ranks: list[Result]) -> dict[str, float]:
    """Largest deviation of losses with perturbed images, first gradients, and weights with buffers."""
    found = {"told": 0.0, "gradient": 0.0, "state": 0.0}
    assert {name for result in ranks for name in result["told"]} == alone["told"].keys()
    for result in ranks:
        for kind in ("told", "state"):
            found[kind] = max(found[kind], *(deviation(v, alone[kind][k]) for k, v in result[kind].items()))
        found["gradient"] = max(found["gradient"], deviation(result["gradient"], alone["gradient"]))
    return found


@pytest.fixture(scope="module")
def alone() -> Callable[..., Result]:
    """One process's result, computed once for each section."""
    known: dict[str, Result] = {}

    def result(spec: dict[str, Any], batch: int = BATCH) -> Result:
        key = repr((spec, batch))
        if key not in known:
            known[key] = play(0, 1, spec, batch=batch)
        return known[key]

    return result


SECTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "denominator": "all", "mdcl": 0.02, "cross": 1.0, "shared_head": True},
    {"perturb": "mixup", "classifier": "soft"},
    {"perturb": "none", "classifier": "hard"},
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("spec", SECTIONS, ids=["paper", "options", "mixup", "none"])
def test_twenty_steps_equal_those_of_one_process(spec: dict[str, Any], size: int, alone: Callable[..., Result]) -> None:
    found = worst(alone(spec), run_ranks(play, size, spec))
    print(f"W={size} {spec}: {found}")
    assert max(found.values()) < CLOSE


def test_ranks_without_images_take_part(alone: Callable[..., Result]) -> None:
    assert max(worst(alone({}, 3), run_ranks(play, 4, {}, "", 3)).values()) < CLOSE


def test_training_moves_everything_but_the_classifier(alone: Callable[..., Result]) -> None:
    _, student = networks(parse(KD3Spec, {"kind": "kd3"}))
    before = {f"network.{name}": value for name, value in student.state_dict().items()}
    for name, value in alone({})["state"].items():
        if name in before:
            still = name.startswith("network.network.fc.")
            assert (deviation(value, before[name]) < 1e-12) == still, name


BREAKS = ["own anchors only", "gradient divided by ranks", "rank indices", "local contrast"]
BREAKS += ["local partners", "local batch norm"]


@pytest.mark.parametrize("sabotage", BREAKS)
def test_the_comparison_notices(sabotage: str, alone: Callable[..., Result]) -> None:
    found = worst(alone({}), run_ranks(play, 2, {}, sabotage))
    print(f"{sabotage}: {found}")
    assert found["gradient"] > DIFFERENT and found["state"] > DIFFERENT


# ------------------------------------------------------------------------------------------- whole runs


def whole_run(folder: Path, **changes: Any) -> recipes.Tree:
    """Seven epochs of three batches over what was selected, with a projector, augmentation and an unreadable image."""
    images: list[Tensor | bytes] = [encoded(picture, "png") for picture in small_pictures(sum(PER_SHARD))]
    images[5] = images[5][:40]
    shards = write_shards(folder / "shards", images, suffix="png")
    tree = recipes.base(recipes.write_teachers(folder, 1), student={"arch": "resnet8"}, out=str(folder / "run"))
    tree["rounds"] = {"warmup": 0, "main": 7, "student_steps": "epoch"}
    selection = {"kind": "kd3", "threshold": 0.15, "batch": 5}
    reader = {"shards": str(shards), "workers": 0, "bad_limit": 0.2}
    tree["source"] = {"kind": "stream", "reader": reader, "selection": selection}
    tree["objective"] = {"kind": "kd3", "head": 6, "mdcl": 0.1}
    tree["augment"] = {"crop_padding": 1, "flip": True}
    return recipes.merged(tree, changes)


@pytest.mark.parametrize("size", [2, 4])
def test_a_whole_run_equals_that_of_one_process(size: int, tmp_path: Path) -> None:
    tree = whole_run(tmp_path)
    single, ranks = playing.train(0, 1, tree), run_ranks(playing.train, size, tree)
    found = playing.worst(single, ranks)
    print(f"W={size}: {found}")
    assert max(found.values()) < CLOSE


def test_a_whole_run_with_local_batches_is_another_method(tmp_path: Path) -> None:
    tree = whole_run(tmp_path)
    single, ranks = playing.train(0, 1, tree), run_ranks(playing.train, 2, tree | {"mesh": {"sync": "local"}})
    assert playing.worst(single, ranks)["states"] > DIFFERENT
