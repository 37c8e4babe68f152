"""CMI's contrast and Fast's moving average against loops written from their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import statistics
from dfkd_dist.losses.contrastive_inversion import own_among_all


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def naive(local: list[list[float]], all_global: list[list[float]], own: list[int], tau: float) -> list[float]:
    """-log of the own global view's share among exp(cosine / tau) of all."""
    found = []
    for row, place in zip(local, own, strict=True):
        scores = [math.exp(cosine(row, other) / tau) for other in all_global]
        found.append(-math.log(scores[place] / sum(scores)))
    return found


def test_contrast_by_value() -> None:
    local, others, own = normal(0, 3, 4), normal(1, 7, 4), torch.tensor([2, 6, 0])
    found = own_among_all(local, others, own, 0.3)
    assert found.tolist() == pytest.approx(naive(local.tolist(), others.tolist(), own.tolist(), 0.3), rel=1e-12)
    assert torch.allclose(own_among_all(5 * local, 0.1 * others, own, 0.3), found)  # lengths do not count


def test_contrast_by_gradient_and_sign() -> None:
    local, others, own = normal(0, 3, 4).requires_grad_(), normal(1, 5, 4), torch.tensor([1, 1, 4])
    assert torch.autograd.gradcheck(lambda x: own_among_all(x, others, own, 0.5), (local,))
    others.requires_grad_()
    before = own_among_all(local, others, own, 0.5)
    before.sum().backward()
    assert local.grad is not None and others.grad is None  # the global side is detached
    with torch.no_grad():
        moved = local - 1e-3 * local.grad
        assert (own_among_all(moved, others, own, 0.5) < before).all()
        closer = torch.nn.functional.cosine_similarity(moved, others[own])
        assert (closer > torch.nn.functional.cosine_similarity(local, others[own])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contrast_is_finite_at_extremes(dtype: torch.dtype) -> None:
    local = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-30, 0.0]], dtype=dtype, requires_grad=True)
    others = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    values = own_among_all(local, others, torch.tensor([0, 1, 2]), 1e-3)
    values.sum().backward()
    assert values.isfinite().all() and local.grad is not None and local.grad.isfinite().all()
    assert values.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert len(own_among_all(local[:0], others, torch.empty(0, dtype=torch.int64), 0.1)) == 0


def test_contrast_names_what_does_not_fit() -> None:
    one = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="global_ME: expected width 3 as local_NE, found 4"):
        own_among_all(one, torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match=r"own_N: expected 2 rows as local_NE, found shape \(3,\)"):
        own_among_all(one, one, torch.zeros(3, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="temperature"):
        own_among_all(one, one, torch.zeros(2, dtype=torch.int64), 0.0)


def test_average_by_value_and_gradient() -> None:
    new, old = normal(2, 4).requires_grad_(), normal(3, 4).requires_grad_()
    found = statistics.averaged(new, old, 0.9)
    assert found.tolist() == pytest.approx([0.1 * a + 0.9 * b for a, b in zip(new.tolist(), old.tolist(), strict=True)])
    found.sum().backward()
    assert new.grad is not None and torch.allclose(new.grad, torch.full((4,), 0.1, dtype=torch.float64))
    assert old.grad is None
    assert torch.equal(statistics.averaged(new, old, 0.0), new)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="momentum: expected a number from 0 to below 1"):
            statistics.averaged(new, old, momentum)
    with pytest.raises(ValueError, match="latest_C and past_C"):
        statistics.averaged(new, old[:2], 0.5)
