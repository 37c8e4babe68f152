"""The batch-norm terms against loops written from the equations, by value, gradient and sign."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import statistics


@dataclass(frozen=True)
class Layer:
    mean_C: Tensor
    var_C: Tensor
    stored_mean_C: Tensor
    stored_var_C: Tensor

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean_C, self.var_C, self.stored_mean_C, self.stored_var_C


def layer(seed: int, channels: int = 4) -> Layer:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(4, channels, generator=g, dtype=torch.float64)
    return Layer(values[0], values[1].square() + 0.05, values[2], values[3].square() + 0.05)


def at_stored(of: Layer) -> Layer:
    return Layer(of.stored_mean_C, of.stored_var_C, of.stored_mean_C, of.stored_var_C)


def naive_kl(mean: float, var: float, stored_mean: float, stored_var: float) -> float:
    ratio = math.sqrt(var) / math.sqrt(stored_var)
    return ((mean - stored_mean) ** 2 + var) / (2 * stored_var) - math.log(ratio) - 0.5


@pytest.mark.parametrize("channels", ["mean", "sum"])
def test_gaussian_kl_by_value(channels: str) -> None:
    of = layer(1)
    each = [naive_kl(*row) for row in zip(*(v.tolist() for v in of.vectors), strict=True)]
    expected = sum(each) / (4 if channels == "mean" else 1)
    found = statistics.gaussian_kl(*of.vectors, channels=channels)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-12)


def test_gaussian_kl_is_the_kl_of_the_batch_to_the_stored_gaussian() -> None:
    of = layer(2)
    batch = torch.distributions.Normal(of.mean_C, of.var_C.sqrt())
    stored = torch.distributions.Normal(of.stored_mean_C, of.stored_var_C.sqrt())
    expected = torch.distributions.kl_divergence(batch, stored).sum()
    assert torch.allclose(statistics.gaussian_kl(*of.vectors, channels="sum"), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_gaussian_kl_is_zero_only_at_the_stored_statistics(seed: int) -> None:
    of = layer(seed)
    assert statistics.gaussian_kl(*of.vectors) > 1e-3
    same = at_stored(of)
    mean, var = same.mean_C.clone().requires_grad_(), same.var_C.clone().requires_grad_()
    value = statistics.gaussian_kl(mean, var, same.stored_mean_C, same.stored_var_C)
    value.backward()
    assert value.abs() < 1e-15 and mean.grad.abs().max() == 0 and var.grad.abs().max() < 1e-12


@pytest.mark.parametrize("channels", ["mean", "sum"])
def test_gaussian_kl_gradient(channels: str) -> None:
    inputs = tuple(v.clone().requires_grad_() for v in layer(3).vectors)
    assert torch.autograd.gradcheck(lambda *v: statistics.gaussian_kl(*v, channels=channels), inputs)
    mean, var, stored_mean, stored_var = inputs
    statistics.gaussian_kl(*inputs, channels="sum").backward()
    assert torch.allclose(mean.grad, (mean - stored_mean) / stored_var)
    assert torch.allclose(var.grad, 0.5 / stored_var - 0.5 / var)


def test_descent_moves_the_batch_to_the_stored_statistics() -> None:
    features = (3 + 5 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    stored_mean, stored_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
    optimiser = torch.optim.Adam([features], lr=0.1)
    for _ in range(200):
        var, mean = torch.var_mean(features, dim=0, correction=0)
        loss = statistics.gaussian_kl(mean, var, stored_mean, stored_var)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3
    assert torch.allclose(features.mean(0), stored_mean, atol=0.05)
    assert torch.allclose(features.var(0, correction=0), stored_var, rtol=0.05)


def test_below_the_floor_the_kl_is_continuous_smooth_and_pushes_variance_up() -> None:
    floor, zero, one = 1e-5, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def at(var: float) -> tuple[float, float]:
        variance = torch.tensor([var], dtype=torch.float64, requires_grad=True)
        value = statistics.gaussian_kl(zero, variance, zero, one, floor=floor)
        value.backward()
        return value.item(), variance.grad.item()

    below, exactly, above = at(floor * (1 - 1e-9)), at(floor), at(floor * (1 + 1e-9))
    assert below == pytest.approx(exactly, rel=1e-8) and above == pytest.approx(exactly, rel=1e-8)
    assert exactly[0] == pytest.approx(naive_kl(0, floor, 0, 1), rel=1e-12)
    for var in (0.0, 1e-8, -1e-7):
        value, gradient = at(var)
        assert value > exactly[0] and gradient == pytest.approx(0.5 - 0.5 / floor)


@pytest.mark.parametrize("stored_var", [0.0, 1e-12, 1e-6])
def test_a_dead_channel_costs_nothing_at_its_stored_statistics(stored_var: float) -> None:
    zero, var = torch.zeros(1), torch.tensor([stored_var], requires_grad=True)
    value = statistics.gaussian_kl(zero, var, zero, var.detach())
    value.backward()
    assert abs(value.item()) < 1e-6 and abs(var.grad.item()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", statistics.FORMS)
def test_extreme_statistics_stay_finite(form: str, dtype: torch.dtype) -> None:
    mean = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    var = torch.tensor([0.0, 1e8, 0.0, -1e-6], dtype=dtype, requires_grad=True)
    stored = Layer(mean, var, torch.zeros(4, dtype=dtype), torch.tensor([0, 1e-12, 0, 1e8], dtype=dtype))
    value = statistics.bn_loss([stored], form=form)
    value.backward()
    assert value.isfinite() and mean.grad.isfinite().all() and var.grad.isfinite().all()
    assert value.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


def test_l2_norms_by_value_and_gradient() -> None:
    of = layer(4)
    rows = [v.tolist() for v in of.vectors]
    means = math.sqrt(sum((a - b) ** 2 for a, b in zip(rows[0], rows[2], strict=True)))
    variances = math.sqrt(sum((a - b) ** 2 for a, b in zip(rows[1], rows[3], strict=True)))
    assert statistics.l2_norms(*of.vectors).item() == pytest.approx(means + variances, rel=1e-12)
    inputs = tuple(v.clone().requires_grad_() for v in of.vectors)
    assert torch.autograd.gradcheck(statistics.l2_norms, inputs)


def test_l2_norms_gradient_is_finite_at_zero_difference() -> None:
    same = at_stored(layer(5))
    mean, var = same.mean_C.clone().requires_grad_(), same.var_C.clone().requires_grad_()
    value = statistics.l2_norms(mean, var, same.stored_mean_C, same.stored_var_C)
    value.backward()
    assert value.item() == 0 and mean.grad.eq(0).all() and var.grad.eq(0).all()


@pytest.mark.parametrize("form", statistics.FORMS)
def test_bn_loss_sums_layers_with_their_factors(form: str) -> None:
    layers = [layer(1, 3), layer(2, 5), layer(3, 2)]
    term = statistics.gaussian_kl if form == "gaussian_kl" else statistics.l2_norms
    each = [term(*of.vectors).item() for of in layers]
    assert statistics.bn_loss(layers, form).item() == pytest.approx(sum(each), rel=1e-12)
    factors = statistics.first_layer_factors(3, 10.0)
    assert factors == [10.0, 1.0, 1.0]
    expected = 10 * each[0] + each[1] + each[2]
    assert statistics.bn_loss(layers, form, factors=factors).item() == pytest.approx(expected, rel=1e-12)


def test_bn_loss_passes_channels_on() -> None:
    of = layer(1, 4)
    total, mean = (statistics.bn_loss([of], channels=channels) for channels in ("sum", "mean"))
    assert total.item() == pytest.approx(4 * mean.item(), rel=1e-12)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="gausian.*nearest: gaussian_kl"):
        statistics.bn_loss([layer(1)], form="gausian")
    with pytest.raises(ValueError, match="channels.*allowed: mean, sum"):
        statistics.gaussian_kl(*layer(1).vectors, channels="max")
    with pytest.raises(ValueError, match="at least one batch-norm layer"):
        statistics.bn_loss([])
    with pytest.raises(ValueError, match="factors: expected 1"):
        statistics.bn_loss([layer(1)], factors=[1.0, 1.0])
    with pytest.raises(ValueError, match="mean_C and stored_var_C"):
        statistics.l2_norms(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(1))
