"""DFND's noise matrix and cross-entropy against loops written from the paper."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import distillation, noisy


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_matrix(logits: Tensor, a: float) -> list[list[float]]:
    classes = len(logits)
    rows = []
    for i in range(classes):
        powers = [math.exp(x) for x in logits[i].tolist()]
        others = [(1 - a) * p / sum(powers) for p in powers]
        rows.append([*others[:i], a, *others[i:]])
    return rows


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_matrix_by_value(classes: int) -> None:
    logits = normal(1, classes, classes - 1)
    q = noisy.log_transition(logits, 0.8).exp()
    assert torch.allclose(q, torch.tensor(naive_matrix(logits, 0.8), dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(q.sum(dim=1), torch.ones(classes, dtype=torch.float64), rtol=1e-12)


def test_the_loss_by_value() -> None:
    student, guesses, logits = normal(2, 4, 3), torch.tensor([0, 2, 2, 1]), normal(1, 3, 2)
    found = noisy.noisy_cross_entropy(student, guesses, noisy.log_transition(logits, 0.7))
    q, p = naive_matrix(logits, 0.7), torch.softmax(student, 1).tolist()
    expected = [-math.log(sum(p[n][i] * q[i][int(guesses[n])] for i in range(3))) for n in range(4)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradients_against_finite_differences() -> None:
    student, logits = normal(2, 4, 3).requires_grad_(), normal(1, 3, 2).requires_grad_()
    guesses = torch.tensor([0, 2, 2, 1])

    def loss(s: Tensor, w: Tensor) -> Tensor:
        return noisy.noisy_cross_entropy(s, guesses, noisy.log_transition(w, 0.7))

    assert torch.autograd.gradcheck(loss, (student, logits))


def test_signs() -> None:
    student, logits = torch.zeros(1, 3, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    noisy.noisy_cross_entropy(student, torch.tensor([2]), noisy.log_transition(logits, 0.9)).sum().backward()
    assert student.grad[0, 2] < 0 < student.grad[0, 0]  # descent raises the guessed class
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]  # and the chance to guess 2 where 0 is true
    assert torch.equal(logits.grad[2], torch.zeros(2))  # the diagonal is given, not learned


def test_a_perfect_teacher_means_plain_cross_entropy() -> None:
    student, guesses = normal(2, 4, 3), torch.tensor([0, 2, 2, 1])
    sure = noisy.log_transition(normal(1, 3, 2), 1 - 1e-12)
    assert torch.allclose(
        noisy.noisy_cross_entropy(student, guesses, sure), distillation.cross_entropy(student, guesses), rtol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    logits = torch.tensor([[1e4, -1e4]] * 3, dtype=dtype, requires_grad=True)
    value = noisy.noisy_cross_entropy(student, torch.tensor([2, 0]), noisy.log_transition(logits, 0.999))
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all() and logits.grad.isfinite().all()
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert noisy.noisy_cross_entropy(student[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(3, 3)).shape == (0,)


@pytest.mark.parametrize("accuracy", [0.0, 1.0, -0.1, math.nan])
def test_the_accuracy_lies_between_0_and_1(accuracy: float) -> None:
    with pytest.raises(ValueError, match="accuracy: expected a number between 0 and 1"):
        noisy.log_transition(torch.zeros(3, 2), accuracy)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(C, C - 1\), found \(3, 3\)"):
        noisy.log_transition(torch.zeros(3, 3), 0.9)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\)"):
        noisy.noisy_cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 3))
