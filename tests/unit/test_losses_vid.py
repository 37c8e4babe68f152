"""VID against loops written from the paper's equations; its variance and its pooling."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import vid


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_vid_by_value() -> None:
    predicted, target, variance = maps(1, 2, 3, 2, 4), maps(2, 2, 3, 2, 4), [0.5, 1.0, 4.0]
    found = vid.vid(predicted, target, torch.tensor(variance, dtype=torch.float64))
    for n in range(2):
        total = 0.0
        for d in range(3):
            for h in range(2):
                for w in range(4):
                    error = target[n, d, h, w].item() - predicted[n, d, h, w].item()
                    total += 0.5 * (math.log(variance[d]) + error**2 / variance[d])
        assert found[n].item() == pytest.approx(total / 24, rel=1e-12)


def test_vid_is_the_gaussian_likelihood_without_its_constant() -> None:
    predicted, target, variance = maps(1, 2, 3, 2, 2), maps(2, 2, 3, 2, 2), maps(3, 3).square() + 0.1
    deviation = variance.sqrt().view(1, 3, 1, 1)
    nll = -torch.distributions.Normal(predicted, deviation).log_prob(target).flatten(1).mean(1)
    assert torch.allclose(vid.vid(predicted, target, variance), nll - 0.5 * math.log(2 * math.pi), rtol=1e-12)


def test_vid_gradients_against_finite_differences() -> None:
    inputs = (maps(1, 2, 3, 2, 2), maps(2, 2, 3, 2, 2), maps(3, 3))
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda mu, t, rho: vid.vid(mu, t, vid.variance(rho)), inputs)


def test_vid_pulls_the_guess_to_the_target_and_the_variance_to_the_error() -> None:
    predicted, target = torch.zeros(64, 1, 1, 1, requires_grad=True), torch.full((64, 1, 1, 1), 2.0)
    rho = torch.tensor([vid.initial_rho(9.0)], requires_grad=True)
    vid.vid(predicted, target, vid.variance(rho)).mean().backward()
    assert (predicted.grad < 0).all()  # descent raises the guess towards 2
    assert rho.grad.item() > 0  # squared error 4 < variance 9: descent lowers the variance
    at_error = torch.tensor([4.0], requires_grad=True)
    vid.vid(predicted.detach(), target, at_error).mean().backward()
    assert at_error.grad.abs().item() < 1e-7


def test_vid_works_on_vectors_and_refuses_wrong_shapes() -> None:
    a, b, variance = maps(1, 2, 3), maps(2, 2, 3), torch.ones(3, dtype=torch.float64)
    assert torch.allclose(vid.vid(a, b, variance), 0.5 * (a - b).square().mean(1), rtol=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        vid.vid(maps(1, 2, 3, 4, 4), maps(1, 2, 3, 2, 2), variance)
    with pytest.raises(ValueError, match="expected 3 channels, found 2"):
        vid.vid(a, b, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vid_is_finite_at_extremes(dtype: torch.dtype) -> None:
    predicted = torch.full((2, 3, 2, 2), 1e4, dtype=dtype, requires_grad=True)
    rho = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    value = vid.vid(predicted, -predicted.detach(), vid.variance(rho))
    value.sum().backward()
    for tensor in (value, predicted.grad, rho.grad):
        assert tensor.isfinite().all()
    assert value.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("initial", [5.0, 0.01, 2e-5, 100.0])
def test_initial_rho_gives_the_initial_variance(initial: float) -> None:
    rho = torch.tensor(vid.initial_rho(initial), dtype=torch.float64)
    assert vid.variance(rho).item() == pytest.approx(initial, rel=1e-8)
    assert vid.initial_rho() == vid.initial_rho(5.0)


@pytest.mark.parametrize("initial", [0.0, 1e-5, -1.0, math.nan, math.inf])
def test_initial_variance_must_exceed_eps(initial: float) -> None:
    with pytest.raises(ValueError, match="initial_variance"):
        vid.initial_rho(initial)


def test_variance_is_softplus_plus_eps() -> None:
    rho = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    expected = [math.log(1 + math.exp(r)) + 1e-3 for r in rho.tolist()]
    assert vid.variance(rho, eps=1e-3).tolist() == pytest.approx(expected, rel=1e-12)


def test_match_spatial_pools_only_what_is_larger() -> None:
    large, small = maps(1, 2, 3, 8, 8), maps(2, 2, 5, 4, 4)
    a, b = vid.match_spatial(large, small)
    assert b is small and torch.allclose(a, large.view(2, 3, 4, 2, 4, 2).mean(dim=(3, 5)), rtol=1e-12)
    b, a = vid.match_spatial(small, large)
    assert b is small and a.shape == (2, 3, 4, 4)
    tall, wide = vid.match_spatial(maps(1, 1, 2, 6, 3), maps(2, 1, 2, 3, 6))
    assert tall.shape == wide.shape == (1, 2, 3, 3)
    assert vid.match_spatial(large.bfloat16(), small)[0].dtype is torch.bfloat16
