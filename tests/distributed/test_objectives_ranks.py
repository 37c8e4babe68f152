"""Every objective gives the same losses and gradients however its global batch is dealt to ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.mesh import world_group
from tests.distributed.harness import run_ranks
from tests.objectives import Class, batch, section

pytestmark = pytest.mark.distributed

CLOSE, DIFFERENT = 1e-9, 1e-6
COUNT = 7
SHARES = {1: [7], 2: [5, 2], 3: [4, 0, 3]}
"""Slots of each rank: unequal, and at three ranks one has none."""
STEPS = ((0, 0), (0, 1), (1, 0))
TWO = ("tiny", "wrn16_1", "resnet8")
LONE = {"kl": 0.0}
SPECS: dict[str, dict[str, Any]] = {
    "pointwise": {"kl": 1.0, "vid": 0.5, "l1": 0.3, "at": 2.0, "ce": 0.1, "hint": 1.5},
    "rkd_d": LONE | {"rkd_d": 25.0},
    "rkd_a": LONE | {"rkd_a": 50.0},
    "crd": LONE | {"crd": 0.8, "contrast": {"dim": 6, "negatives": 9}},
    "noisy": {"kind": "noisy"},
    "sskd": {"kind": "sskd", "keep_tf": 0.5, "keep_ss": 0.5},
    "sskd-head-first": {"kind": "sskd", "head_rounds": 1, "ss_temperature": 0.2},
}
COUPLED = ("rkd_d", "rkd_a", "crd", "sskd", "sskd-head-first")
"""Those whose value is not a sum over images, or that remember other ranks' images."""

Result = dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]]


def play(rank: int, size: int, names: tuple[str, ...], local: bool = False, told: bool = True) -> Result:
    """Losses, then gradients and buffers, at every step of each objective; every step moves the parameters."""
    world = world_group(rank, size)
    return {name: _play_one(section(**SPECS[name]), rank, world, local, told) for name in names}


def _play_one(spec: Any, rank: int, world: Group, local: bool, told: bool) -> Any:
    coupled = ALONE if local else world
    # A memory is the same on all ranks also where terms see one rank's images only; here it is not, to see it fail.
    learner = Class(spec, TWO, coupled, coupled if "crd" in spec.model_fields_set else world)
    shares = SHARES[world.size]
    low, found = sum(shares[:rank]), []
    for at in STEPS:
        given = batch(COUNT, low, low + shares[rank], at, spec.views)
        given = replace(given, block=spec.views * max(shares) if told else None)
        losses = learner.losses(given)
        gradients = learner.gradients(losses)
        _descend(learner, gradients, world)
        state = {n: b.clone() for n, b in learner.objective.named_buffers()}
        found.append(({n: v.detach() for n, v in losses.terms.items()}, gradients | state))
    return found


def _descend(learner: Class, gradients: dict[str, Tensor], world: Group) -> None:
    """One step down the summed gradient, so that later steps depend on all before."""
    named = {"student": learner.student, "objective": learner.objective}
    with torch.no_grad():
        for name, gradient in gradients.items():
            module, _, path = name.partition(".")
            named[module].get_parameter(path).sub_(0.01 * world.sum_(gradient.clone()))


@cache
def alone(names: tuple[str, ...]) -> Result:
    return play(0, 1, names)


def off(name: str, ranks: list[Result]) -> float:
    """Largest deviation of the ranks' sums from one process, relative to what is compared (and to 1)."""
    single, worst = alone(tuple(SPECS))[name], 0.0
    for step, (terms, tensors) in enumerate(single):
        parts = [result[name][step] for result in ranks]
        assert all(list(part[0]) == list(terms) for part in parts)
        for term, value in terms.items():
            worst = max(worst, deviation(sum(part[0][term] for part in parts), value))
        for key, value in tensors.items():
            if "." in key and key.split(".")[0] in ("student", "objective"):
                worst = max(worst, deviation(sum(part[1][key] for part in parts), value))
            else:
                worst = max(worst, *(deviation(part[1][key], value) for part in parts))
    return worst


def deviation(found: Any, expected: Tensor) -> float:
    if expected.dtype in (torch.bool, torch.int64):
        return float((found != expected).any())
    scale = max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / scale


@pytest.fixture(scope="module")
def ranks() -> Callable[..., list[Result]]:
    """What the ranks of one way of playing say, run once for all objectives."""
    known: dict[Any, list[Result]] = {}

    def results(size: int, names: tuple[str, ...] = tuple(SPECS), *given: Any) -> list[Result]:
        key = (size, names, given)
        if key not in known:
            known[key] = run_ranks(play, size, names, *given)
        return known[key]

    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SPECS)
def test_ranks_add_up_to_one_process(name: str, size: int, ranks: Callable[..., list[Result]]) -> None:
    found = off(name, ranks(size))
    print(f"{name} on {size} ranks: {found:.1e}")
    assert found < CLOSE


@pytest.mark.parametrize("name", SPECS)
def test_ranks_that_must_ask_for_the_longest_share(name: str, ranks: Callable[..., list[Result]]) -> None:
    assert off(name, ranks(3, tuple(SPECS), False, False)) < CLOSE


@pytest.mark.parametrize("name", COUPLED)
def test_a_group_of_one_gives_another_answer(name: str, ranks: Callable[..., list[Result]]) -> None:
    assert off(name, ranks(2, COUPLED, True)) > DIFFERENT


def test_buffers_are_equal_on_all_ranks(ranks: Callable[..., list[Result]]) -> None:
    first, *others = ranks(3)
    for name in ("crd", "sskd-head-first"):
        for step, (_, tensors) in enumerate(first[name]):
            buffers = [key for key in tensors if not key.startswith(("student.", "objective."))]
            assert buffers
            assert all(torch.equal(r[name][step][1][key], tensors[key]) for r in others for key in buffers)


def test_everything_that_learns_has_a_gradient() -> None:
    for name, steps in alone(tuple(SPECS)).items():
        moving = {key for _, tensors in steps for key, value in tensors.items() if value.double().abs().max() > 1e-12}
        learning = {key for key in steps[0][1] if key.startswith("objective.")}
        assert learning <= moving, (name, learning - moving)
