"""CRD's noise-contrastive loss against a loop written from its equations; the two ways of reading a memory."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import contrastive


def unit(seed: int, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def choices(seed: int, n: int, k: int, high: int) -> Tensor:
    return torch.randint(high, (n, k), generator=torch.Generator().manual_seed(seed))


def naive(similarities: list[float], z: float, tau: float, samples: int) -> float:
    """-log h for the positive, -log(1 - h) for each negative; h = P / (P + K / M)."""
    negatives = len(similarities) - 1

    def h(s: float) -> float:
        p = math.exp(s / tau) / z
        return p / (p + negatives / samples)

    return -math.log(h(similarities[0])) - sum(math.log(1 - h(s)) for s in similarities[1:])


def test_nce_by_value() -> None:
    s = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 - 0.3
    found = contrastive.nce(s, math.log(37.0), 0.2, 11)
    assert found.tolist() == pytest.approx([naive(row, 37.0, 0.2, 11) for row in s.tolist()], rel=1e-11)


def test_nce_gradient_and_sign() -> None:
    s = (torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrastive.nce(x, 1.3, 0.3, 9), (s,))
    contrastive.nce(s, 1.3, 0.3, 9).sum().backward()
    assert (s.grad[:, 0] < 0).all() and (s.grad[:, 1:] > 0).all()  # descent: nearer to the positive, off the others


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nce_is_finite_at_extremes(dtype: torch.dtype) -> None:
    s = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]], dtype=dtype, requires_grad=True)
    value = contrastive.nce(s, 0.0, 1e-3, 10**7)
    value.sum().backward()
    assert value.isfinite().all() and s.grad.isfinite().all()
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_nce_needs_a_negative() -> None:
    with pytest.raises(ValueError, match="a positive and a negative at least, found 1 columns"):
        contrastive.nce(torch.zeros(2, 1), 0.0, 0.1, 5)
    with pytest.raises(ValueError, match="temperature"):
        contrastive.nce(torch.zeros(2, 3), 0.0, 0.0, 5)


@pytest.mark.parametrize(("samples", "k"), [(6, 40), (500, 3)])
def test_similarities_both_ways(samples: int, k: int) -> None:
    embedded, memory, rows = unit(1, 4, 5).requires_grad_(), unit(2, samples, 5), choices(3, 4, k, samples)
    found = contrastive.similarities(embedded, memory, rows)
    expected = torch.stack([torch.stack([memory[j] @ embedded[i] for j in rows[i]]) for i in range(4)])
    assert torch.allclose(found, expected, rtol=1e-12)
    weights = unit(4, 4, k)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), embedded)
    memory.zero_()  # a memory moves before the backward pass
    (gradient,) = torch.autograd.grad((found * weights).sum(), embedded)
    assert torch.allclose(gradient, wanted, rtol=1e-12)


def test_similarities_of_no_images() -> None:
    assert contrastive.similarities(unit(1, 0, 5), unit(2, 6, 5), choices(3, 0, 7, 6)).shape == (0, 7)
    with pytest.raises(ValueError, match="rows"):
        contrastive.similarities(unit(1, 2, 5), unit(2, 6, 5), choices(3, 3, 7, 6))


def test_the_normaliser_adds_up_over_ranks() -> None:
    s = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = contrastive.normaliser_parts(s[:2], 0.1, 9) + contrastive.normaliser_parts(s[2:], 0.1, 9)
    expected = 9 * sum(math.exp(x / 0.1) for x in s.flatten().tolist()) / 20
    assert (parts[0] / parts[1]).item() == pytest.approx(expected, rel=1e-12)
    low = contrastive.normaliser_parts(torch.ones(1, 2), 0.01, 5)
    assert low.dtype is torch.float64 and low.isfinite().all()


def test_rows_move_and_keep_their_length() -> None:
    rows, seen = unit(1, 3, 4), unit(2, 3, 4).requires_grad_()
    found = contrastive.moved(rows, seen, 0.25)
    mixed = 0.25 * rows + 0.75 * seen.detach()
    assert torch.allclose(found, mixed / mixed.norm(dim=1, keepdim=True), rtol=1e-12)
    assert not found.requires_grad
    against = contrastive.moved(rows, -rows, 0.5)  # they cancel: no direction, but no NaN
    assert torch.equal(against, torch.zeros_like(rows))
