"""SSKD's similarities, selection and transfer against loops written from the paper; masks and single samples."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import selfsupervised as ss


def embedded(seed: int, m: int = 3, v: int = 4, e: int = 5) -> Tensor:
    return torch.randn(m, v, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_similarity(x: Tensor) -> list[list[float]]:
    m, v, _ = x.shape

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    return [[cosine(x[i, t], x[k, 0]) for k in range(m)] for i in range(m) for t in range(1, v)]


def softmax(row: list[float], tau: float) -> list[float]:
    powers = [math.exp(x / tau) for x in row]
    return [p / sum(powers) for p in powers]


def all_rows(similarity: Tensor) -> Tensor:
    return torch.ones(len(similarity), dtype=torch.bool)


def test_similarity_by_value() -> None:
    x = embedded(1)
    expected = torch.tensor(naive_similarity(x), dtype=torch.float64)
    assert torch.allclose(ss.similarity(x), expected, rtol=1e-12)
    assert ss.own_sample(expected).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_self_supervision_by_value() -> None:
    x = embedded(1)
    rows = naive_similarity(x)
    expected = sum(-math.log(softmax(row, 0.7)[r // 3]) for r, row in enumerate(rows)) / len(rows)
    assert ss.self_supervision(ss.similarity(x), 0.7).item() == pytest.approx(expected, rel=1e-12)


def test_transfer_by_value() -> None:
    student, teacher = embedded(1), embedded(2, e=7)
    keep = torch.tensor([True, False, True, True, False, True, True, True, False])
    total = 0.0
    for r, (s, t) in enumerate(zip(naive_similarity(student), naive_similarity(teacher), strict=True)):
        p, q = softmax(t, 0.5), softmax(s, 0.5)
        total += float(keep[r]) * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = ss.transfer(ss.similarity(student), ss.similarity(teacher), 0.5, keep)
    assert found.item() == pytest.approx(0.25 * total / 6, rel=1e-11)


def test_gradients_against_finite_differences() -> None:
    student, teacher = embedded(1).requires_grad_(), ss.similarity(embedded(2))
    keep = torch.tensor([True, False] * 4 + [True])
    assert torch.autograd.gradcheck(lambda x: ss.transfer(ss.similarity(x), teacher, 0.5, keep), (student,))
    assert torch.autograd.gradcheck(lambda x: ss.self_supervision(ss.similarity(x), 0.5), (student,))


def test_descent_helps_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = embedded(1).requires_grad_(), embedded(2).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return ss.transfer(ss.similarity(x), ss.similarity(teacher), 0.5, all_rows(ss.similarity(x)))

    before = loss(student)
    before.backward()
    assert teacher.grad is None and before > 0
    assert loss((student - 0.1 * student.grad).detach()) < before
    assert loss(teacher.detach()).abs() < 1e-12


def test_rank_of_truth() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.2, 0.2, 0.2]])
    assert ss.rank_of_truth(scores, torch.tensor([0, 0, 1])).tolist() == [2, 0, 1]


def test_least_wrong_as_in_the_paper() -> None:
    ranks = torch.tensor([0, 3, 1, 0, 2, 1, 5])
    # Five wrong ones, ordered 1 (row 2), 1 (row 5), 2, 3, 5: 75 % of them are three.
    assert ss.least_wrong(ranks, 0.75).tolist() == [True, False, True, True, True, True, False]
    assert ss.least_wrong(ranks, 0.0).tolist() == [True, False, False, True, False, False, False]
    assert ss.least_wrong(ranks, 1.0).all()
    # At one rank the earlier rows come first.
    assert ss.least_wrong(torch.tensor([1, 1, 1, 1]), 0.5).tolist() == [True, True, False, False]


def test_least_wrong_under_a_mask() -> None:
    ranks, valid = torch.tensor([0, 3, 1, 0, 2, 1, 5, 0]), torch.tensor([True, True, False, True] * 2)
    found = ss.least_wrong(ranks, 0.5, valid)
    assert torch.equal(found[valid], ss.least_wrong(ranks[valid], 0.5)) and not found[~valid].any()
    assert not ss.least_wrong(ranks, 1.0, torch.zeros(8, dtype=torch.bool)).any()
    with pytest.raises(ValueError, match="share"):
        ss.least_wrong(ranks, 1.5)


def test_masked_samples_count_for_nothing() -> None:
    student, teacher = embedded(1, m=5).requires_grad_(), embedded(2, m=5)
    mask = torch.tensor([True, False, True, True, False])
    whole, part = ss.similarity(student), ss.similarity(student[mask])
    rows = mask.repeat_interleave(3)
    found = ss.transfer(whole, ss.similarity(teacher), 0.5, rows, mask)
    expected = ss.transfer(part, ss.similarity(teacher[mask]), 0.5, all_rows(part))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    head = ss.self_supervision(whole, 0.5, mask)
    assert head.item() == pytest.approx(ss.self_supervision(part, 0.5).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found + head, student)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(dim=2).all()
    nobody = torch.zeros(5, dtype=torch.bool)
    assert ss.self_supervision(whole, 0.5, nobody) == 0
    assert ss.transfer(whole, ss.similarity(teacher), 0.5, nobody.repeat_interleave(3), nobody) == 0


@pytest.mark.parametrize("m", [0, 1])
def test_a_single_sample_has_nothing_to_be_told_from(m: int) -> None:
    student, teacher = embedded(1, m=m).requires_grad_(), embedded(2, m=m)
    own = ss.similarity(student)
    value = ss.transfer(own, ss.similarity(teacher), 0.5, all_rows(own)) + ss.self_supervision(own, 0.5)
    value.backward()
    assert value.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_and_zero_features_are_no_trouble(dtype: torch.dtype) -> None:
    student = torch.ones(3, 4, 5, dtype=dtype)
    student[0] = 0
    student.requires_grad_()
    own = ss.similarity(student)
    value = ss.transfer(own, ss.similarity(embedded(2).to(dtype)), 0.5, all_rows(own)) + ss.self_supervision(own, 0.5)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_one_version_is_not_enough() -> None:
    with pytest.raises(ValueError, match="at least 2 versions, found 1"):
        ss.similarity(torch.zeros(3, 1, 4))
