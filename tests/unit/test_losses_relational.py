"""RKD against loops over pairs and triples, written from the paper; masks, ties and bounded memory."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import relational

TERMS = [relational.distance, relational.angle]


def features(seed: int, n: int = 6, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float, y: float) -> float:
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def naive_distance(student: Tensor, teacher: Tensor) -> float:
    pairs = list(permutations(range(len(student)), 2))

    def scaled(f: Tensor) -> dict[tuple[int, ...], float]:
        d = {(i, j): math.dist(f[i].tolist(), f[j].tolist()) for i, j in pairs}
        mu = sum(d.values()) / len(pairs)
        return {pair: value / mu for pair, value in d.items()}

    s, t = scaled(student), scaled(teacher)
    return sum(huber(t[p], s[p]) for p in pairs) / len(pairs)


def naive_angle(student: Tensor, teacher: Tensor) -> float:
    triples = list(permutations(range(len(student)), 3))

    def cosine(f: Tensor, i: int, j: int, k: int) -> float:
        a, b = f[i] - f[j], f[k] - f[j]
        return float(a @ b / (a.norm() * b.norm()))

    return sum(huber(cosine(teacher, *p), cosine(student, *p)) for p in triples) / len(triples)


def test_distance_by_value() -> None:
    # Two far images make differences above 1, where the loss is linear.
    student, teacher = features(1), features(2, d=7)
    student[0] += 40.0
    assert relational.distance(student, teacher).item() == pytest.approx(naive_distance(student, teacher), rel=1e-12)


def test_angle_by_value() -> None:
    student, teacher = features(1), features(2, d=7)
    assert relational.angle(student, teacher).item() == pytest.approx(naive_angle(student, teacher), rel=1e-12)
    line = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)  # cosines of 1 and -1: differences of 2
    bent = torch.tensor([[0.0], [1.0], [0.5]], dtype=torch.float64)
    assert relational.angle(line, bent).item() == pytest.approx(naive_angle(line, bent), rel=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_gradient_against_finite_differences(term: object) -> None:
    student, teacher = features(1).requires_grad_(), features(2, d=3)
    assert torch.autograd.gradcheck(lambda s: term(s, teacher), (student,))  # type: ignore[operator]
    mask = torch.tensor([True, True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda s: term(s, teacher, mask), (student,))  # type: ignore[operator]


@pytest.mark.parametrize("term", TERMS)
def test_descent_brings_the_student_nearer(term: object) -> None:
    student, teacher = features(1).requires_grad_(), features(2)
    before = term(student, teacher)  # type: ignore[operator]
    before.backward()
    with torch.no_grad():
        after = term(student - 0.1 * student.grad, teacher)  # type: ignore[operator]
    assert after < before and before > 0


@pytest.mark.parametrize("term", TERMS)
def test_shifts_turns_and_scale_do_not_matter(term: object) -> None:
    teacher = features(2)
    turned, _ = torch.linalg.qr(features(3, 5, 5))
    assert term(3.0 * teacher @ turned + 7.0, teacher).item() < 1e-24  # type: ignore[operator]


@pytest.mark.parametrize("term", TERMS)
def test_masked_rows_count_for_nothing(term: object) -> None:
    student, teacher = features(1, 8).requires_grad_(), features(2, 8)
    mask = torch.tensor([True, False, True, True, False, True, True, False])
    whole = term(student, teacher, mask)  # type: ignore[operator]
    assert whole.item() == pytest.approx(term(student[mask], teacher[mask]).item(), rel=1e-12)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(whole, student)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(dim=1).all()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_images_give_zero(term: object, n: int) -> None:
    student = features(1, n).requires_grad_()
    value = term(student, features(2, n))  # type: ignore[operator]
    value.backward()
    if n < 2 or term is relational.angle:
        assert value.item() == 0
    assert value.isfinite() and student.grad.isfinite().all()
    nobody = term(features(1), features(2), torch.zeros(6, dtype=torch.bool))  # type: ignore[operator]
    assert nobody.item() == 0


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_features_are_no_trouble(term: object, dtype: torch.dtype) -> None:
    student = features(1).to(dtype)
    student[1] = student[0]  # zero distance, no direction
    student[2] = student[0]
    student.requires_grad_()
    value = term(student, features(2).to(dtype))  # type: ignore[operator]
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    same = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    value = term(same, features(2, 4).to(dtype))  # type: ignore[operator]
    value.backward()
    assert value.isfinite() and torch.equal(same.grad, torch.zeros_like(same))


def test_vertices_in_parts_give_the_same() -> None:
    student, teacher = features(1, 7).requires_grad_(), features(2, 7)
    whole = relational.angle(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    for elements in (1, 2 * 7 * 17):
        parts = relational.angle(student, teacher, elements=elements)
        (gradient,) = torch.autograd.grad(parts, student)
        assert parts.item() == pytest.approx(whole.item(), rel=1e-13)
        assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 dimension"):
        relational.distance(torch.zeros(2, 3, 1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="student's rows and teacher's rows"):
        relational.angle(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="student's rows and mask_N"):
        relational.angle(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
