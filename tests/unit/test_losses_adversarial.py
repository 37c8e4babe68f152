"""The adversarial terms: minus a discrepancy, so that minimising them makes two networks disagree."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import adversarial, distillation

Term = Callable[[Tensor, Tensor], Tensor]
TERMS: dict[str, Term] = {
    "kl": lambda t, a: adversarial.kl(t, a, 3.0),
    "l1": adversarial.l1,
    "log_l1": lambda t, a: adversarial.log_l1(distillation.l1(t, a).mean()),
    "masked_kl": lambda t, a: adversarial.masked_kl(t, a, 3.0),
}
EXTREME = [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [88.0, 87.0, -103.0]]


def agreeing_logits(seed: int) -> tuple[Tensor, Tensor]:
    """Two sets of different logits with the same argmax, so that the masked term is on everywhere."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    both[:, torch.arange(6), torch.arange(6) % 4] += 6
    return both[0], both[1]


def naive_kl(t: list[float], a: list[float], tau: float) -> float:
    p, q = ([math.exp(v / tau) for v in row] for row in (t, a))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_kl_by_value_is_minus_kl_teacher_first(tau: float) -> None:
    t, a = agreeing_logits(1)
    expected = [-naive_kl(x, y, tau) for x, y in zip(t.tolist(), a.tolist(), strict=True)]
    assert adversarial.kl(t, a, tau).tolist() == pytest.approx(expected, rel=1e-11)
    student_term = distillation.kl(torch.softmax(t / tau, 1), a, tau)
    assert torch.allclose(adversarial.kl(t, a, tau), -student_term, rtol=1e-11)


def test_l1_and_log_l1_by_value() -> None:
    t, a = agreeing_logits(2)
    means = [sum(abs(x - y) for x, y in zip(r, s, strict=True)) / 4 for r, s in zip(t, a, strict=True)]
    assert adversarial.l1(t, a).tolist() == pytest.approx([-float(m) for m in means], rel=1e-12)
    of_the_mean = -math.log(sum(means) / len(means) + 1)
    assert TERMS["log_l1"](t, a).item() == pytest.approx(of_the_mean, rel=1e-12)
    # The mean of each sample's own logarithm is another number.
    assert abs(of_the_mean + sum(math.log(m + 1) for m in means) / len(means)) > 1e-4
    with pytest.raises(ValueError, match="mean_l1"):
        adversarial.log_l1(distillation.l1(t, a))


def test_masked_kl_counts_only_samples_where_both_agree() -> None:
    t = torch.tensor([[3.0, 0.0], [3.0, 0.0]], requires_grad=True)
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = adversarial.masked_kl(t, a, 1.0)
    assert value[0].item() == pytest.approx(-naive_kl([3.0, 0.0], [1.0, 0.0], 1.0), rel=1e-5)
    assert value[1].item() == 0
    value.sum().backward()
    assert t.grad[0].abs().min() > 0 and a.grad[0].abs().min() > 0
    assert t.grad[1].eq(0).all() and a.grad[1].eq(0).all()


@pytest.mark.parametrize("name", TERMS)
def test_gradients_against_finite_differences(name: str) -> None:
    t, a = (x.requires_grad_() for x in agreeing_logits(3))
    assert torch.autograd.gradcheck(TERMS[name], (t, a))


@pytest.mark.parametrize("name", TERMS)
def test_gradient_reaches_both_networks_when_they_differ(name: str) -> None:
    t, a = (x.requires_grad_() for x in agreeing_logits(4))
    TERMS[name](t, a).sum().backward()
    assert (t.grad.abs().sum(1) > 1e-6).all() and (a.grad.abs().sum(1) > 1e-6).all()


@pytest.mark.parametrize("name", TERMS)
def test_term_is_zero_at_equality_and_negative_elsewhere(name: str) -> None:
    t, a = agreeing_logits(5)
    assert TERMS[name](t, t.clone()).abs().max() < 1e-15
    assert (TERMS[name](t, a) < 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_one_step_of_a_generator_increases_disagreement(name: str) -> None:
    g = torch.Generator().manual_seed(6)
    teacher, assistant = (torch.randn(8, 4, generator=g, dtype=torch.float64) for _ in range(2))
    assistant = teacher + 0.1 * assistant
    latent = torch.randn(16, 5, generator=g, dtype=torch.float64)
    generator = torch.randn(5, 8, generator=g, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([generator], lr=1e-3)

    def disagreement(discrepancy: Term) -> Tensor:
        images = torch.tanh(latent @ generator)
        return discrepancy(images @ teacher, images @ assistant).mean()

    def kl(t: Tensor, a: Tensor) -> Tensor:
        return distillation.kl(torch.softmax(t / 3, 1), a, 3.0)

    measure = distillation.l1 if "l1" in name else kl
    before = disagreement(measure).item()
    disagreement(TERMS[name]).backward()
    optimiser.step()
    assert disagreement(measure).item() > before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TERMS)
def test_terms_are_finite_at_extremes(name: str, dtype: torch.dtype) -> None:
    rows = torch.tensor(EXTREME, dtype=dtype)
    for other in (rows, rows.flip(1), -rows, torch.zeros_like(rows)):
        t, a = rows.clone().requires_grad_(), other.clone().requires_grad_()
        value = TERMS[name](t, a)
        value.sum().backward()
        assert value.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert value.isfinite().all() and t.grad.isfinite().all() and a.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_shapes_do_not_broadcast(name: str) -> None:
    with pytest.raises(ValueError, match="one shape"):
        TERMS[name](torch.zeros(3, 4), torch.zeros(1, 4))
