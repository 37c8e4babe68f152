"""Adaptive competition against sums written out, and on which side of its bounds it has a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import js

TAU = 3.0


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(t: list[float], s: list[float], tau: float, form: str) -> float:
    p, q = ([math.exp(v / tau) for v in row] for row in (s, t))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    if form == "jensen_shannon":
        sides = [[a * math.log(a / c) for a, c in zip(probs, m, strict=True)] for probs in (p, q)]
    else:
        p, q, m = ([min(max(v, 0.01), 0.99) for v in row] for row in (p, q, m))
        sides = [[c * math.log(c / a) for a, c in zip(probs, m, strict=True)] for probs in (p, q)]
    return 0.5 * sum(map(sum, sides))


@pytest.mark.parametrize("form", js.DIVERGENCES)
@pytest.mark.parametrize("tau", [0.3, 1.0, TAU])
def test_by_value(form: str, tau: float) -> None:
    t, s = logits(1), logits(2)
    expected = [naive(a, b, tau, form) for a, b in zip(t.tolist(), s.tolist(), strict=True)]
    assert js.divergence(t, s, tau, form).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_clamp_is_at_work_in_that_test() -> None:
    probs = (logits(1) / 0.3).softmax(dim=1)
    assert (probs < 0.01).any() and (probs > 0.99).any()


@pytest.mark.parametrize("form", js.DIVERGENCES)
def test_it_is_symmetric_and_zero_for_equals(form: str) -> None:
    t, s = logits(1), logits(2)
    assert torch.allclose(js.divergence(t, s, TAU, form), js.divergence(s, t, TAU, form), rtol=1e-12)
    assert js.divergence(t, t + 7.0, TAU, form).abs().max() < 1e-12
    assert js.divergence(t, s, TAU, form).min() > 0


def test_js_is_at_most_log_2() -> None:
    t = torch.tensor([[50.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    assert js.divergence(t, t.flip(1), 1.0, "jensen_shannon").tolist() == pytest.approx([math.log(2)] * 2, rel=1e-12)


@pytest.mark.parametrize("form", js.DIVERGENCES)
def test_gradients_against_finite_differences(form: str) -> None:
    t, s = (logits(seed, 1.0).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda a, b: js.divergence(a, b, TAU, form), (t, s))


@pytest.mark.parametrize("form", js.DIVERGENCES)
def test_minimising_the_competition_drives_the_two_apart(form: str) -> None:
    t, s = (logits(seed, 1.0).requires_grad_() for seed in (5, 6))
    before = js.divergence(t, s, TAU, form)
    js.competition(before.mean()).backward()
    after = js.divergence(t.detach() - t.grad, s.detach() - s.grad, TAU, form)
    assert after.mean() > before.mean()


def test_beyond_the_bounds_there_is_no_gradient() -> None:
    for value, expected, slope in ((0.3, 0.7, -1.0), (1.5, 0.0, 0.0), (-0.2, 1.0, 0.0)):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        y = js.competition(x)
        y.backward()
        assert (y.item(), x.grad.item()) == pytest.approx((expected, slope))


@pytest.mark.parametrize("form", js.DIVERGENCES)
def test_extreme_logits_stay_finite(form: str) -> None:
    t = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    s = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [88.0, 87.0, -103.0]], requires_grad=True)
    value = js.divergence(t, s, 1.0, form)
    value.sum().backward()
    assert all(x.isfinite().all() for x in (value, t.grad, s.grad))


def test_errors_name_what_is_wrong() -> None:
    t = logits(1)
    with pytest.raises(ValueError, match="form.*jensen_shannon"):
        js.divergence(t, t, TAU, "jensen-shannon")
    with pytest.raises(ValueError, match="one shape"):
        js.divergence(t, t[:2], TAU, "released")
    with pytest.raises(ValueError, match="temperature"):
        js.divergence(t, t, 0.0, "released")
    with pytest.raises(ValueError, match="mean_divergence"):
        js.competition(torch.zeros(3))
