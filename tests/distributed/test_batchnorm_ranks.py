"""Batch norm over ranks against torch's own on the whole batch, and networks that others only read."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.registry import build_network
from dfkd_dist.parallel.batchnorm import GroupBatchNorm, reading_only, synchronise
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.mesh import world_group
from tests.distributed.harness import run_ranks
from tests.recipes import stir

EXACT = 1e-12
SLICES = [[5, 2], [3, 0], [4, 1, 2], [0, 6, 0], [1, 1, 1]]


def _layer(momentum: float | None = 0.1, affine: bool = True, dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
    return stir(nn.Sequential(kind(4, momentum=momentum, affine=affine), nn.Linear(1, 1)), 0)[0].double()


def _data(count: int, dims: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = (count, 4, 3, 2) if dims == 2 else (count, 4)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1 for _ in range(2))  # type: ignore


def _step(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Three forward passes and a backward; the loss is not linear in the output."""
    for _ in range(2):
        layer(x)
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    (out.sin() * upstream).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "input gradient": x.grad}
    found |= {f"{n} gradient": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in layer.named_buffers()}


def _on_rank(rank: int, size: int, slices: list[int], options: dict[str, Any]) -> dict[str, Tensor]:
    x, upstream = (part.split(slices)[rank] for part in _data(sum(slices), options.get("dims", 2)))
    layer = synchronise(_layer(**options), world_group(rank, size))
    if options.get("dims", 2) == 2:
        x = x.contiguous(memory_format=torch.channels_last) if rank else x
    return _step(layer, x, upstream)


@pytest.mark.distributed
@pytest.mark.parametrize("slices", SLICES)
def test_as_plain_batch_norm_on_the_whole_batch(slices: list[int]) -> None:
    _compare(slices, {})


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"dims": 1}])
def test_every_kind_of_batch_norm(options: dict[str, Any]) -> None:
    _compare([4, 1, 2], options)


def _compare(slices: list[int], options: dict[str, Any]) -> None:
    whole = _step(_layer(**options), *_data(sum(slices), options.get("dims", 2)))
    ranks = run_ranks(_on_rank, len(slices), slices, options)
    for name, expected in whole.items():
        parts = [rank[name] for rank in ranks]
        if name in ("out", "input gradient"):
            found = torch.cat(parts)
        elif "gradient" in name:
            found = torch.stack(parts).sum(dim=0)  # parameter gradients are shares
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            found = parts[0]
        assert (found - expected).abs().max() < EXACT, name


def _half(rank: int, size: int) -> tuple[torch.dtype, bool, float]:
    layer = nn.BatchNorm2d(4)
    x = _data(6)[0].float()
    whole = layer.train()(x)
    mine = x.split([4, 2])[rank].bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = synchronise(nn.Sequential(nn.BatchNorm2d(4)), world_group(rank, size))(mine)
    out.float().sum().backward()
    assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
    off = float((out.float() - whole.split([4, 2])[rank]).abs().max())
    return out.dtype, out.is_contiguous(memory_format=torch.channels_last), off


@pytest.mark.distributed
def test_half_precision_and_layout_are_kept() -> None:
    for dtype, channels_last, off in run_ranks(_half, 2):
        assert dtype == torch.bfloat16 and channels_last
        assert off < 0.03  # bf16 has 8 bits


# ----------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("arch", ["tiny", "resnet8", "wrn16_1"])
def test_synchronise_keeps_names_values_and_the_tensors_themselves(arch: str) -> None:
    network = stir(build_network(arch, num_classes=3), 0).eval()
    before = dict(network.state_dict(keep_vars=True))
    images = torch.rand(4, 3, 8, 8)
    expected = network(images)
    assert synchronise(network, ALONE) is network
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert not network.training and all(not m.training for m in network.modules())
    assert torch.equal(network(images), expected)
    kinds = [type(m) for m in network.modules()]
    assert nn.BatchNorm2d not in kinds and GroupBatchNorm in kinds


def test_a_layer_in_two_places_stays_one_layer() -> None:
    norm = nn.BatchNorm2d(2)
    network = nn.Sequential(norm, nn.Sequential(norm), nn.ReLU(), norm)
    synchronise(network, ALONE)
    assert isinstance(network[0], GroupBatchNorm)
    assert network[0] is network[1][0] is network[3]  # type: ignore[index]


def test_a_single_layer_is_replaced() -> None:
    assert isinstance(synchronise(nn.BatchNorm2d(2), ALONE), GroupBatchNorm)


def test_frozen_parameters_stay_frozen() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2)).requires_grad_(False)
    assert not any(p.requires_grad for p in synchronise(network, ALONE).parameters())


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_a_reader_changes_nothing(mode: Literal["eval", "batch"], training: bool) -> None:
    network = synchronise(stir(build_network("resnet8", num_classes=3), 0), ALONE).train(training)
    network.fc.weight.requires_grad_(False)  # somebody else froze it: it must stay so
    for p in network.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = copy.deepcopy(network.state_dict())
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    with reading_only(network, mode):
        out = network(images)
    out.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None or torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())
    assert network.training == training and all(m.training == training for m in network.modules())
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert all(m.reading is None for m in network.modules() if isinstance(m, GroupBatchNorm))


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_a_reader_sees_stored_or_batch_statistics(mode: Literal["eval", "batch"]) -> None:
    layer = _layer()
    x, _ = _data(5)
    expected = F.batch_norm(
        x,
        layer.running_mean if mode == "eval" else None,  # type: ignore[arg-type]
        layer.running_var if mode == "eval" else None,  # type: ignore[arg-type]
        layer.weight,  # type: ignore[arg-type]
        layer.bias,  # type: ignore[arg-type]
        training=mode == "batch",
    )
    network = synchronise(nn.Sequential(layer), ALONE).train()
    with reading_only(network, mode):
        assert torch.allclose(network(x), expected, atol=EXACT)


def test_reading_ends_also_after_an_error() -> None:
    network = synchronise(nn.Sequential(nn.BatchNorm2d(2)), ALONE).train()
    with pytest.raises(RuntimeError), reading_only(network, "batch"):
        raise RuntimeError
    assert network.training and network[0].reading is None and network[0].weight.requires_grad  # type: ignore
