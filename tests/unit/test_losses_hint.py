"""FitNet's hint against a loop written from its equation."""

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import hint


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hint_by_value() -> None:
    student, teacher = maps(1, 2, 3, 2, 4), maps(2, 2, 3, 2, 4)
    found = hint.hint(student, teacher)
    for n in range(2):
        total = sum(
            (a - b) ** 2 for a, b in zip(student[n].flatten().tolist(), teacher[n].flatten().tolist(), strict=True)
        )
        assert found[n].item() == pytest.approx(total / 24, rel=1e-12)


def test_hint_gradient_and_direction() -> None:
    student, teacher = maps(1, 2, 3, 2, 2).requires_grad_(), maps(2, 2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: hint.hint(s, teacher), (student,))
    hint.hint(student, teacher).sum().backward()
    assert torch.equal(student.grad > 0, student > teacher)  # descent moves the student to the teacher


def test_hint_is_zero_at_the_teacher_and_exact_in_half_precision() -> None:
    teacher = maps(1, 2, 3, 2, 2)
    assert torch.equal(hint.hint(teacher, teacher), torch.zeros(2, dtype=torch.float64))
    low = hint.hint(teacher.bfloat16(), -teacher.bfloat16())
    assert low.dtype is torch.float32 and torch.allclose(
        low.double(), 4 * teacher.square().flatten(1).mean(1), rtol=2e-2
    )
    huge = torch.full((1, 2, 2, 2), 1e4, dtype=torch.float16)
    assert hint.hint(huge, -huge).isfinite().all()
    assert hint.hint(maps(1, 0, 3, 2, 2), maps(1, 0, 3, 2, 2)).shape == (0,)


def test_hint_refuses_maps_of_unequal_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        hint.hint(maps(1, 2, 3, 4, 4), maps(1, 2, 3, 2, 2))
