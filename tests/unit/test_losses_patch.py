"""The patch game against loops written from Eqs. 3 and 4, by value, gradient and sign, at scores of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import patch

FORMS: list[Any] = ["non_saturating", "saturating"]
REDUCTIONS: list[Any] = ["mean", "sum"]
EXTREME = [0.0, -0.0, 1e-30, 20.0, -20.0, 88.0, -103.0, 745.0, -745.0, 1e4, -1e4, 3e38, -3e38]


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_d(score: float) -> float:
    """D(patch), the probability that it is real."""
    return 1 / (1 + math.exp(-score))


def naive(scores: Tensor, of_patch: Any, reduction: str) -> list[float]:
    """One value for each image, from its patches one by one."""
    totals = [sum(of_patch(naive_d(s)) for s in image.flatten().tolist()) for image in scores]
    count = scores[0].numel()
    return [total / count if reduction == "mean" else total for total in totals]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (5, 7), (2, 1, 1, 1)])
def test_the_discriminators_terms_by_value(reduction: Any, shape: tuple[int, ...]) -> None:
    scores = random_scores(*shape)
    real = naive(scores, lambda d: -math.log(d), reduction)
    fake = naive(scores, lambda d: -math.log(1 - d), reduction)
    assert patch.real(scores, reduction).tolist() == pytest.approx(real, rel=1e-12)
    assert patch.fake(scores, reduction).tolist() == pytest.approx(fake, rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_generators_terms_by_value(reduction: Any) -> None:
    scores = random_scores(3, 1, 4, 4)
    usual = naive(scores, lambda d: -math.log(d), reduction)
    printed = naive(scores, lambda d: math.log(1 - d), reduction)
    assert patch.generator(scores, "non_saturating", reduction).tolist() == pytest.approx(usual, rel=1e-12)
    assert patch.generator(scores, "saturating", reduction).tolist() == pytest.approx(printed, rel=1e-12)


def test_eq_3_is_what_the_discriminator_maximises() -> None:
    """Both terms with the weight 1 are minus Eq. 3: at D = 1/2 everywhere, minus 2 log(1/2)."""
    nothing = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    loss = patch.discriminator_weight("mean") * (patch.real(nothing, "mean") + patch.fake(nothing, "mean")).mean()
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-12)


def test_sums_are_the_released_scaling() -> None:
    """Both cross-entropies summed over everything, over 2 B; and the generator's over B."""
    real, made, images = random_scores(6, 1, 8, 8), random_scores(6, 1, 8, 8, seed=1), 6
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    both = bce(made, torch.zeros_like(made), reduction="sum") + bce(real, torch.ones_like(real), reduction="sum")
    ours = patch.discriminator_weight("sum") * (patch.real(real, "sum").sum() + patch.fake(made, "sum").sum()) / images
    assert ours.item() == pytest.approx((both / (2 * images)).item(), rel=1e-12)
    theirs = bce(made, torch.ones_like(made), reduction="sum") / images
    assert patch.generator(made, "non_saturating", "sum").mean().item() == pytest.approx(theirs.item(), rel=1e-12)
    mean = patch.generator(made, "non_saturating", "mean").mean().item()
    assert theirs.item() == pytest.approx(64 * mean, rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_by_hand(reduction: Any) -> None:
    """d/ds of -log D is D - 1, of -log(1 - D) it is D, of log(1 - D) it is -D; over P patches for the mean."""
    scores = random_scores(3, 1, 4, 4)
    d, patches = scores.sigmoid(), 16 if reduction == "mean" else 1
    expected = {
        lambda s: patch.real(s, reduction): (d - 1) / patches,
        lambda s: patch.fake(s, reduction): d / patches,
        lambda s: patch.generator(s, "non_saturating", reduction): (d - 1) / patches,
        lambda s: patch.generator(s, "saturating", reduction): -d / patches,
    }
    for term, gradient in expected.items():
        leaf = scores.clone().requires_grad_()
        term(leaf).sum().backward()
        assert leaf.grad is not None and torch.allclose(leaf.grad, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_finite_differences(form: Any, reduction: Any) -> None:
    scores = random_scores(2, 1, 3, 3).requires_grad_()
    torch.autograd.gradcheck(lambda s: patch.generator(s, form, reduction), scores)
    torch.autograd.gradcheck(lambda s: patch.real(s, reduction) + patch.fake(s, reduction), scores)


@pytest.mark.parametrize("form", FORMS)
def test_signs(form: Any) -> None:
    """A step down the generator's term makes its patches pass; the discriminator's terms tell them apart."""
    for term, up in (
        (lambda s: patch.generator(s, form, "mean"), True),
        (lambda s: patch.real(s, "mean"), True),
        (lambda s: patch.fake(s, "mean"), False),
    ):
        scores = random_scores(2, 1, 3, 3).requires_grad_()
        term(scores).sum().backward()
        assert scores.grad is not None and bool(((scores.grad < 0) if up else (scores.grad > 0)).all())
    assert bool((patch.generator(random_scores(2, 9), "saturating", "mean") < 0).all())


def test_only_the_usual_form_pulls_where_the_discriminator_wins() -> None:
    pulls = {}
    for form in FORMS:
        scores = torch.full((1, 1, 2, 2), -30.0, dtype=torch.float64, requires_grad=True)
        patch.generator(scores, form, "sum").sum().backward()
        assert scores.grad is not None
        pulls[form] = float(scores.grad.abs().max())
    assert pulls["non_saturating"] == pytest.approx(1.0) and pulls["saturating"] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_scores_stay_finite(form: Any, dtype: torch.dtype) -> None:
    scores = torch.tensor(EXTREME, dtype=dtype).view(-1, 1).requires_grad_()
    values = [patch.real(scores, "mean"), patch.fake(scores, "mean"), patch.generator(scores, form, "mean")]
    for value in values:
        assert value.isfinite().all() and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        assert gradient.isfinite().all() and bool((gradient.abs() <= 1).all())


def test_large_scores_are_not_rounded_away() -> None:
    """-log D(s) is exp(-s) for large s and -s for very negative ones, to the last digits of a double."""
    scores = torch.tensor([[30.0], [-30.0], [700.0]], dtype=torch.float64)
    expected = [math.log1p(math.exp(-30.0)), 30.0 + math.log1p(math.exp(-30.0)), math.exp(-700.0)]
    assert patch.real(scores, "mean").tolist() == pytest.approx(expected, rel=1e-14)


def test_no_images() -> None:
    assert patch.real(torch.zeros(0, 1, 8, 8), "mean").shape == (0,)
    assert patch.generator(torch.zeros(0, 1, 8, 8), "saturating", "sum").sum().item() == 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"form: unknown name 'saturated'; nearest: saturating"):
        patch.generator(torch.zeros(1, 2), "saturated", "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction: unknown name 'none'.*allowed: mean, sum"):
        patch.real(torch.zeros(1, 2), "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores: expected \[N, ...\] with a map of scores for each image"):
        patch.real(torch.zeros(3), "mean")
