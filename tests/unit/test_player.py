"""A player's flat gradient, clipping, schedules and state against plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from dfkd_dist.config import OptimizerSpec, ScheduleSpec
from dfkd_dist.engine.optim import make_player
from dfkd_dist.models.registry import build_network
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.player import Player, constant, cosine, multistep

SPECS = [
    OptimizerSpec(lr=0.1),
    OptimizerSpec(lr=0.1, nesterov=True, weight_decay=1e-2),
    OptimizerSpec(lr=0.1, momentum=0.0),
    OptimizerSpec(kind="adam", lr=1e-2, betas=[0.5, 0.999]),
    OptimizerSpec(kind="adamw", lr=1e-2, weight_decay=1e-2),
]


class Odd(nn.Module):
    """Every shape for which strides are ambiguous: one channel in, one out, 1x1 kernels, vectors, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.grey, self.point = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 1)
        self.depthwise, self.single = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(1, 1, 1)
        self.fc, self.scale = nn.Linear(16, 3), nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.single(self.point(self.depthwise(self.grey(x)).relu())).flatten(1)
        return self.fc(x) * self.scale


def _player(module: nn.Module, **options: Any) -> Player:
    arguments = {"factor": constant, "total_steps": 10, "group": ALONE} | options
    return Player("p", module, lambda ps: torch.optim.SGD(ps, lr=0.1), **arguments)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _loss(module: nn.Module, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 1, 8, 8, generator=g)
    return F.cross_entropy(module(x), torch.arange(5) % 3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_live_in_one_buffer_in_their_parameters_layout(channels_last: bool) -> None:
    torch.manual_seed(0)
    module = Odd()
    plain = copy.deepcopy(module)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    player = _player(module)
    player.backward(_loss(module, 0))
    _loss(plain, 0).backward()
    start = player.gradient.untyped_storage().data_ptr()
    for (name, p), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and p.grad.untyped_storage().data_ptr() == start, name
        assert p.grad.shape == p.shape
        wide = [d for d in range(p.dim()) if p.shape[d] > 1]
        assert [p.grad.stride(d) for d in wide] == [p.stride(d) for d in wide], name
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        assert torch.allclose(p.grad, expected, atol=1e-6), name
    assert player.gradient.numel() == sum(p.numel() for p in module.parameters())
    assert torch.isclose(player.gradient.norm(), torch.stack([p.grad.norm() for p in module.parameters()]).norm())


def test_followers_move_with_the_leader_as_in_one_optimiser() -> None:
    torch.manual_seed(0)
    module, values = Odd().double(), nn.Parameter(torch.randn(5, 1, 8, 8, dtype=torch.float64))
    plain, other = copy.deepcopy(module), copy.deepcopy(values)
    leader, follower = _player(module), Player("z", nn.ParameterList([values]), _sgd, constant, 1, ALONE)
    leader.followers = [follower]
    together = torch.optim.SGD([*plain.parameters(), other], lr=0.1)
    for _ in range(3):
        leader.backward((module(values) ** 2).sum())
        assert bool(leader.finite())
        leader.step()
        together.zero_grad()
        (plain(other) ** 2).sum().backward()
        together.step()
    assert torch.allclose(values, other, atol=1e-12) and follower.steps == leader.steps == 3
    assert all(torch.allclose(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    follower.gradient[3] = torch.nan
    assert not bool(leader.finite())
    assert "followers" not in str(leader.state_dict().keys())


def test_backward_starts_from_zero() -> None:
    module = Odd()
    player = _player(module)
    player.backward(_loss(module, 0))
    once = player.gradient.clone()
    player.backward(_loss(module, 0))
    assert torch.equal(player.gradient, once)


def test_frozen_parameters_are_left_out() -> None:
    module = Odd()
    module.fc.requires_grad_(False)
    player = _player(module)
    assert module.fc.weight.grad is None and not any(p is module.fc.weight for p in player.parameters)
    player.backward(_loss(module, 0))
    assert module.fc.weight.grad is None


@pytest.mark.parametrize("limit", [1e-3, 0.1, 1e3])
def test_clip_as_torch_does(limit: float) -> None:
    torch.manual_seed(0)
    module = Odd().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(module)
    player, optimizer = _player(module, clip=limit), torch.optim.SGD(plain.parameters(), lr=0.1)
    player.backward(_loss(module, 0))
    _loss(plain, 0).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
    player.step()
    optimizer.step()
    for p, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, other, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.momentum}-{s.nesterov}")
@pytest.mark.parametrize(
    "schedule", [ScheduleSpec(), ScheduleSpec(kind="cosine"), ScheduleSpec(kind="multistep", milestones=[0.4, 0.6])]
)
def test_trains_as_plain_torch(spec: OptimizerSpec, schedule: ScheduleSpec) -> None:
    torch.manual_seed(0)
    module = build_network("tiny", num_classes=3, in_channels=1).double()
    plain = copy.deepcopy(module)
    player = make_player("p", module, spec, schedule, 10, ALONE)
    optimizer = _plain_optimizer(spec, plain)
    scheduler = _plain_scheduler(schedule, optimizer, 10)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    for _ in range(10):
        player.backward(module(x).square().sum() / 100)
        player.step()
        optimizer.zero_grad()
        (plain(x).square().sum() / 100).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for p, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, other, atol=1e-9)


def _plain_optimizer(spec: OptimizerSpec, module: nn.Module) -> torch.optim.Optimizer:
    parameters, decay = module.parameters(), spec.weight_decay
    match spec.kind:
        case "sgd":
            return torch.optim.SGD(parameters, spec.lr, spec.momentum, weight_decay=decay, nesterov=spec.nesterov)
        case "adam":
            return torch.optim.Adam(parameters, spec.lr, (spec.betas[0], spec.betas[1]), weight_decay=decay)
        case _:
            return torch.optim.AdamW(parameters, spec.lr, (spec.betas[0], spec.betas[1]), weight_decay=decay)


def _plain_scheduler(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler | None:
    if spec.kind == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if spec.kind == "multistep":
        return MultiStepLR(optimizer, [int(m * steps) for m in spec.milestones], gamma=0.1)
    return None


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_as_torch(steps: int, floor: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, factor = CosineAnnealingLR(optimizer, steps, eta_min=0.5 * floor), cosine(floor)
    for step in range(steps):
        assert 0.5 * factor(step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert factor(1.0) == pytest.approx(floor, abs=1e-12) == factor(1.5)


@pytest.mark.parametrize("steps", [10, 100, 240])
@pytest.mark.parametrize("milestones", [[0.5], [0.4, 0.6], [0.3, 0.6, 0.8], [0.0, 0.1]])
def test_multistep_as_torch(steps: int, milestones: list[float]) -> None:
    factor = multistep(milestones, 0.2)
    for step in range(steps):
        passed = sum(step >= round(m * steps) for m in milestones)
        assert factor(step / steps) == pytest.approx(0.2**passed), step


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.momentum}-{s.nesterov}")
def test_a_state_goes_round(spec: OptimizerSpec) -> None:
    schedule = ScheduleSpec(kind="cosine")
    torch.manual_seed(0)
    first = make_player("p", Odd().to(memory_format=torch.channels_last), spec, schedule, 8, ALONE)
    _run(first, 0, 4)
    state = copy.deepcopy(first.state_dict())
    _run(first, 4, 8)
    second = make_player("p", Odd().to(memory_format=torch.channels_last), spec, schedule, 8, ALONE)
    _run(second, 7, 8)  # a player that has already moved
    second.load_state_dict(state)
    _run(second, 4, 8)
    assert second.steps == first.steps == 8
    for p, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, other)


def _run(player: Player, start: int, end: int) -> None:
    for seed in range(start, end):
        player.backward(_loss(player.module, seed))
        player.step()
