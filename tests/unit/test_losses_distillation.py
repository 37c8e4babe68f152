"""The distillation terms against loops written from the equations, by value, gradient and sign."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import distillation

EXTREME = [
    [1e4, -1e4, 0.0],
    [-1e4, -1e4, 1e4],
    [0.0, 0.0, 0.0],
    [88.0, -103.0, 1.0],
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def random_logits(seed: int, n: int = 5, c: int = 4) -> Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def naive_softmax(row: list[float], tau: float) -> list[float]:
    powers = [math.exp(v / tau) for v in row]
    return [p / sum(powers) for p in powers]


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def finite(*tensors: Tensor) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("tau", [1.0, 3.0, 0.5])
def test_tempered_mean_is_a_mean_of_probabilities(tau: float) -> None:
    teachers, weights = [random_logits(k) for k in range(3)], [0.5, 0.3, 0.2]
    found = distillation.tempered_mean(teachers, weights, tau)
    for n in range(5):
        rows = [naive_softmax(t[n].tolist(), tau) for t in teachers]
        expected = [sum(w * row[c] for w, row in zip(weights, rows, strict=True)) for c in range(4)]
        assert found[n].tolist() == pytest.approx(expected, rel=1e-12)
    of_logits = torch.softmax(distillation.mean_logits(teachers, weights) / tau, 1)
    assert (found - of_logits).abs().max() > 1e-3  # the other plausible ensemble is a different target


def test_mean_logits_by_value() -> None:
    a, b = random_logits(1), random_logits(2)
    assert torch.allclose(distillation.mean_logits([a, b], [0.25, 0.75]), 0.25 * a + 0.75 * b, rtol=1e-14)


@pytest.mark.parametrize("weights", [[0.5], [0.7, 0.7], [1.5, -0.5], [math.nan, 1.0]])
def test_teacher_weights_must_be_shares_of_one(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        distillation.tempered_mean([random_logits(1), random_logits(2)], weights, 1.0)


def test_teachers_must_agree_in_shape_and_exist() -> None:
    with pytest.raises(ValueError, match=r"logits_list\[1\]"):
        distillation.mean_logits([random_logits(1), random_logits(2, c=3)], [0.5, 0.5])
    with pytest.raises(ValueError, match="at least one teacher"):
        distillation.mean_logits([], [])


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        distillation.kl(torch.ones(2, 2) / 2, torch.zeros(2, 2), tau)


def test_lowest_entropy_choice_picks_per_sample_and_breaks_ties_by_order() -> None:
    sure, unsure = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]
    probs = torch.tensor([[sure, unsure, [1.0, 0.0, 0.0]], [unsure, sure, [0.0, 1.0, 0.0]]])
    assert torch.equal(
        distillation.lowest_entropy_choice(probs), torch.tensor([sure, sure, [1.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("tau", [1.0, 3.0, 0.7])
def test_both_kls_by_value(tau: float) -> None:
    p, logits = torch.softmax(random_logits(1), 1), random_logits(2)
    forward, reverse = distillation.kl(p, logits, tau), distillation.reverse_kl(p, logits, tau)
    for n in range(5):
        q = naive_softmax(logits[n].tolist(), tau)
        assert forward[n].item() == pytest.approx(naive_kl(p[n].tolist(), q), rel=1e-12)
        assert reverse[n].item() == pytest.approx(naive_kl(q, p[n].tolist()), rel=1e-12)
    assert (forward >= 0).all() and (reverse >= 0).all()


@pytest.mark.parametrize("divergence", [distillation.kl, distillation.reverse_kl])
def test_kl_is_zero_with_zero_gradient_at_equality(divergence) -> None:
    logits = random_logits(3).requires_grad_()
    value = divergence(torch.softmax(logits.detach() / 3, 1), logits, 3.0)
    value.sum().backward()
    assert value.abs().max() < 1e-14 and logits.grad.abs().max() < 1e-14


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    p, logits = torch.softmax(random_logits(1), 1), random_logits(2).requires_grad_()
    distillation.kl(p, logits, 3.0).sum().backward()
    assert torch.allclose(logits.grad, (torch.softmax(logits.detach() / 3, 1) - p) / 3, rtol=1e-10)


def test_kl_tempers_the_student_only_and_has_no_tau_squared() -> None:
    p, logits = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.0, 3.0]])
    expected = naive_kl([0.8, 0.2], naive_softmax([0.0, 3.0], 3.0))
    assert distillation.kl(p, logits, 3.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", [distillation.kl, distillation.reverse_kl])
def test_kl_gradients_against_finite_differences(divergence) -> None:
    target, logits = random_logits(1).requires_grad_(), random_logits(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: divergence(torch.softmax(t, 1), s, 3.0), (target, logits))


@pytest.mark.parametrize("divergence", [distillation.kl, distillation.reverse_kl])
def test_a_gradient_step_brings_the_student_nearer(divergence) -> None:
    p, logits = torch.softmax(random_logits(1), 1), random_logits(2).requires_grad_()
    before = divergence(p, logits, 1.0).sum()
    (gradient,) = torch.autograd.grad(before, logits)
    assert divergence(p, logits.detach() - 0.05 * gradient, 1.0).sum() < before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", [distillation.kl, distillation.reverse_kl])
def test_kl_is_finite_at_extremes(divergence, dtype: torch.dtype) -> None:
    for targets in (torch.eye(3)[torch.tensor([0, 1, 2, 0])], torch.full((4, 3), 1 / 3)):
        target = targets.to(dtype).requires_grad_()
        logits = torch.tensor(EXTREME, dtype=dtype).requires_grad_()
        value = divergence(target, logits, 0.5)
        value.sum().backward()
        assert value.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert finite(value, target.grad, logits.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_of_extreme_teachers_is_finite(dtype: torch.dtype) -> None:
    a, b = (torch.tensor(EXTREME, dtype=dtype, requires_grad=True) for _ in range(2))
    s = torch.tensor(EXTREME, dtype=dtype).flip(1).requires_grad_()
    for divergence in (distillation.kl, distillation.reverse_kl):
        divergence(distillation.tempered_mean([a, b], [0.5, 0.5], 1.0), s, 1.0).sum().backward()
    assert finite(a.grad, b.grad, s.grad)


def test_bf16_logits_are_computed_in_fp32() -> None:
    p, logits = torch.softmax(random_logits(1), 1).float(), random_logits(2).bfloat16()
    assert torch.equal(distillation.kl(p, logits, 3.0), distillation.kl(p, logits.float(), 3.0))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
def test_l1_is_a_mean_over_all_but_samples(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distillation.l1(a, b)
    for n in range(shape[0]):
        pairs = list(zip(a[n].flatten().tolist(), b[n].flatten().tolist(), strict=True))
        assert found[n].item() == pytest.approx(sum(abs(x - y) for x, y in pairs) / len(pairs), rel=1e-12)


def test_l1_gradient_is_a_sign_and_shapes_do_not_broadcast() -> None:
    a, b = random_logits(1), random_logits(2).requires_grad_()
    distillation.l1(a, b).sum().backward()
    assert torch.equal(b.grad, torch.sign(b.detach() - a) / 4)
    with pytest.raises(ValueError, match="one shape"):
        distillation.l1(torch.zeros(3, 4), torch.zeros(3, 1))


def test_cross_entropy_by_value_gradient_and_extremes() -> None:
    logits, labels = random_logits(1).requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
    found = distillation.cross_entropy(logits, labels)
    expected = [-math.log(naive_softmax(r, 1.0)[y]) for r, y in zip(logits.tolist(), labels, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    assert torch.allclose(logits.grad, torch.softmax(logits.detach(), 1) - one_hot, rtol=1e-10)
    extreme = torch.tensor(EXTREME, requires_grad=True)
    value = distillation.cross_entropy(extreme, torch.tensor([1, 0, 2, 1]))
    value.sum().backward()
    assert value[0].item() == pytest.approx(2e4) and finite(value, extreme.grad)


def naive_attention(channels: list[list[list[float]]]) -> list[float]:
    d, h, w = len(channels), len(channels[0]), len(channels[0][0])
    squares = [sum(channels[c][i][j] ** 2 for c in range(d)) / d for i in range(h) for j in range(w)]
    norm = math.sqrt(sum(v * v for v in squares))
    return [v / norm for v in squares]


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_transfer_by_value_with_unequal_channels() -> None:
    student, teacher = maps(1, 2, 3, 4, 5), maps(2, 2, 6, 4, 5)
    found = distillation.attention_transfer(student, teacher)
    for n in range(2):
        a, b = naive_attention(student[n].tolist()), naive_attention(teacher[n].tolist())
        expected = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 20
        assert found[n].item() == pytest.approx(expected, rel=1e-11)


def test_attention_transfer_pools_the_larger_map() -> None:
    student, teacher = maps(1, 2, 3, 8, 8), maps(2, 2, 3, 4, 4)
    mean_square = student.square().mean(1)
    pooled = mean_square.view(2, 4, 2, 4, 2).mean(dim=(2, 4)).flatten(1)
    pooled = pooled / pooled.norm(dim=1, keepdim=True)
    expected = (pooled - distillation.attention_map(teacher)).square().mean(1)
    assert torch.allclose(distillation.attention_transfer(student, teacher), expected, rtol=1e-10)
    assert torch.allclose(distillation.attention_transfer(teacher, student), expected, rtol=1e-10)


def test_attention_transfer_gradient() -> None:
    student, teacher = maps(1, 2, 3, 4, 4).requires_grad_(), maps(2, 2, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(distillation.attention_transfer, (student, teacher))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1e4, 1e15])
def test_attention_is_finite_and_scale_free(scale: float) -> None:
    student = (maps(1, 2, 3, 4, 4).float() * scale).requires_grad_()
    value = distillation.attention_transfer(student, maps(2, 2, 3, 4, 4).float())
    value.sum().backward()
    assert finite(value, student.grad)
    if 1e-4 <= scale:
        expected = distillation.attention_map(maps(1, 2, 3, 4, 4)).float()
        assert torch.allclose(distillation.attention_map(student.detach()), expected, rtol=1e-4)


def test_attention_transfer_is_zero_for_proportional_maps() -> None:
    teacher = maps(1, 2, 3, 4, 4)
    assert distillation.attention_transfer(-7 * teacher, teacher).abs().max() < 1e-15
