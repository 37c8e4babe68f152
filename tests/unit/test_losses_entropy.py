"""The entropy and activation terms against loops written from the equations, by value, gradient and sign."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import activation, entropy

EXTREME = [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0], [-103.0, 88.0, 1e-8]]


def random_logits(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def naive_entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def step(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The logits after one Adam step on the loss, as a generator would take it."""
    parameter = logits.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr=1e-2)
    loss(parameter).backward()
    optimiser.step()
    return parameter.detach()


def test_instance_entropy_by_value_and_gradient() -> None:
    logits = random_logits(1)
    expected = [naive_entropy(naive_softmax(row)) for row in logits.tolist()]
    assert entropy.instance_entropy(logits).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(entropy.instance_entropy, (logits.requires_grad_(),))


def test_one_hot_is_cross_entropy_to_the_own_argmax() -> None:
    logits = random_logits(2).requires_grad_()
    expected = [-math.log(max(naive_softmax(row))) for row in logits.tolist()]
    found = entropy.one_hot(logits)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    own = torch.eye(4, dtype=torch.float64)[logits.detach().argmax(1)]
    assert torch.allclose(logits.grad, torch.softmax(logits.detach(), 1) - own, rtol=1e-10)


def test_ice_and_oh_are_different_terms() -> None:
    logits = random_logits(3)
    assert (entropy.instance_entropy(logits) - entropy.one_hot(logits)).abs().min() > 1e-3


def test_negative_batch_entropy_by_value_and_gradient() -> None:
    mean = torch.softmax(random_logits(4), 1).mean(0)
    found = entropy.negative_batch_entropy(mean)
    assert found.shape == () and found.item() == pytest.approx(-naive_entropy(mean.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(entropy.negative_batch_entropy, (mean.requires_grad_(),))
    uniform = torch.full((8,), 1 / 8)
    assert entropy.negative_batch_entropy(uniform).item() == pytest.approx(-math.log(8), rel=1e-6)
    assert entropy.negative_batch_entropy(torch.eye(3)[1]).item() == 0


@pytest.mark.parametrize("term", [entropy.instance_entropy, entropy.one_hot])
def test_a_step_on_ice_or_oh_makes_the_teacher_surer(term) -> None:
    logits = random_logits(5)
    after = step(lambda x: term(x).mean(), logits)
    assert (entropy.instance_entropy(after) < entropy.instance_entropy(logits)).all()


def test_a_step_on_bce_mixes_the_classes() -> None:
    logits = random_logits(6) + torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)

    def batch_entropy(x: Tensor) -> float:
        return naive_entropy(torch.softmax(x, 1).mean(0).tolist())

    after = step(lambda x: entropy.negative_batch_entropy(torch.softmax(x, 1).mean(0)), logits)
    assert batch_entropy(after) > batch_entropy(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entropies_are_finite_at_extremes(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for term in (entropy.instance_entropy, entropy.one_hot):
        logits = torch.tensor(EXTREME, dtype=dtype, requires_grad=True)
        value = term(logits)
        value.sum().backward()
        assert value.dtype == wide and value.isfinite().all() and logits.grad.isfinite().all()
    logits = torch.tensor(EXTREME[:1], dtype=dtype, requires_grad=True)
    probs = torch.softmax(logits, 1).mean(0)
    probs.retain_grad()
    value = entropy.negative_batch_entropy(probs)
    value.backward()
    assert value.dtype == wide and value.isfinite()
    assert probs.grad.isfinite().all() and logits.grad.isfinite().all()
    assert (probs.grad[1:] < -1).all()  # descent still raises a class that has vanished


def test_entropy_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="mean_probs_C"):
        entropy.negative_batch_entropy(torch.ones(2, 3))
    with pytest.raises(ValueError, match="logits_NC"):
        entropy.instance_entropy(torch.ones(3))


def test_activation_by_value_gradient_and_sign() -> None:
    features = random_logits(7).requires_grad_()
    found = activation.activation(features)
    expected = [-sum(abs(v) for v in row) / 4 for row in features.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    assert torch.equal(features.grad, -torch.sign(features.detach()) / 4)
    after = step(lambda x: activation.activation(x).mean(), features.detach())
    assert (after.abs() > features.detach().abs()).all()
    assert activation.activation(torch.full((1, 8), -1e4).bfloat16()).dtype is torch.float32
