"""Scores against float64 arithmetic with more digits than it needs, and where plain confidences tie."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses.scores import mean_probs, scores, surest


def naive(logits: list[list[list[float]]], weights: list[float]) -> list[tuple[float, float, int]]:
    """(-log max p, entropy, argmax) of p = sum_k w_k softmax(z_k) in 80 digits, image by image."""
    getcontext().prec = 80
    out = []
    for n in range(len(logits[0])):
        p = [Decimal(0)] * len(logits[0][0])
        for z_NC, weight in zip(logits, weights, strict=True):
            exps = [Decimal(z).exp() for z in z_NC[n]]
            p = [a + Decimal(weight) * e / sum(exps) for a, e in zip(p, exps, strict=True)]
        total = sum(p)
        p = [a / total for a in p]
        entropy = -sum(a * a.ln() for a in p)
        out.append((float(-max(p).ln()), float(entropy), max(range(len(p)), key=lambda c: p[c])))
    return out


def logits(seed: int, n: int, c: int, spread: float) -> Tensor:
    return spread * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 20.0])
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1]])
def test_against_many_digits(spread: float, weights: list[float]) -> None:
    given = [logits(k, 12, 7, spread) for k in range(len(weights))]
    found = scores(given, weights)
    wanted = naive([z.tolist() for z in given], weights)
    for i, (confidence, entropy, label) in enumerate(wanted):
        assert found.confidence_N[i].item() == pytest.approx(confidence, rel=2e-7, abs=1e-37)
        assert found.entropy_N[i].item() == pytest.approx(entropy, rel=2e-7, abs=1e-37)
        assert spread == 0.0 or found.labels_N[i].item() == label
    assert found.confidence_N.dtype == found.entropy_N.dtype == torch.float32


def test_one_teacher_is_the_formula() -> None:
    z_NC = logits(3, 50, 10, 8.0)
    best_N, at_N = z_NC.double().max(dim=1)
    others_NC = (z_NC.double() - best_N[:, None]).exp().scatter(1, at_N[:, None], 0.0)
    torch.testing.assert_close(
        scores([z_NC], [1.0]).confidence_N, torch.log1p(others_NC.sum(dim=1)).float(), rtol=2e-7, atol=0
    )


def test_confident_images_do_not_tie() -> None:
    z_NC = torch.zeros(40, 10)
    z_NC[:, 3] = torch.linspace(20.0, 80.0, 40)
    assert len(z_NC.half().softmax(dim=1).max(dim=1).values.unique()) == 1
    for given, weights in (([z_NC], [1.0]), ([z_NC, z_NC + 5.0], [0.4, 0.6])):
        found = scores(given, weights)
        assert len(found.confidence_N.unique()) == 40
        assert (found.confidence_N.diff() < 0).all()  # a clearer winner has a smaller score
        assert (found.entropy_N.diff() < 0).all() and (found.entropy_N > 0).all()
    far = torch.tensor([[0.0, 200.0], [0.0, 300.0]])
    assert scores([far], [1.0]).confidence_N.tolist() == [0.0, 0.0]  # beyond fp32: they do tie


def test_limits_and_labels() -> None:
    even = scores([torch.zeros(2, 5)], [1.0])
    assert even.confidence_N.tolist() == pytest.approx([math.log(5)] * 2)
    assert even.entropy_N.tolist() == pytest.approx([math.log(5)] * 2)
    assert even.labels_N.tolist() == [0, 0]
    half = scores([torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float16)], [1.0])
    assert half.confidence_N.dtype == torch.float32 and half.labels_N.tolist() == [2]
    assert torch.isnan(scores([torch.tensor([[0.0, float("nan")]])], [1.0]).confidence_N).all()
    empty = scores([torch.zeros(0, 5)], [1.0])
    assert [len(part) for part in empty] == [0, 0, 0]


def test_batch_mates_do_not_matter() -> None:
    z_NC = logits(5, 300, 100, 4.0)
    whole = scores([z_NC], [1.0])
    for start, stop in ((0, 1), (1, 8), (8, 300)):
        part = scores([z_NC[start:stop]], [1.0])
        assert torch.equal(part.confidence_N, whole.confidence_N[start:stop])
        assert torch.equal(part.entropy_N, whole.entropy_N[start:stop])


def test_surest_teacher() -> None:
    first, second = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 5.0], [0.0, 2]])
    assert surest([first, second]).tolist() == [0, 1, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        scores([], [])
    with pytest.raises(ValueError, match="shares of 1"):
        scores([torch.zeros(1, 2)], [0.5])
    with pytest.raises(ValueError, match="one shape"):
        mean_probs([torch.zeros(1, 2), torch.zeros(1, 3)], [0.5, 0.5])
    with pytest.raises(ValueError, match="dimension"):
        scores([torch.zeros(2)], [1.0])
