"""DeepInversion's priors against loops over pixels, and what an empty or flat image does to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import priors

DIRECTIONS = [(0, 1), (1, 0), (1, -1), (1, 1)]
"""Down and right to the neighbour: right, down, and the two diagonals."""
TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tv": lambda x: priors.tv(priors.tv_squares(x)),
    "tv_l1": priors.tv_l1,
    "l2": priors.l2,
    "l2_squares": priors.l2_squares,
}


def pictures(seed: int = 0, shape: tuple[int, ...] = (3, 2, 4, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(image: list[list[list[float]]], direction: tuple[int, int]) -> list[float]:
    down, right = direction
    found = []
    for channel in image:
        for y, row in enumerate(channel):
            for x, value in enumerate(row):
                if y + down < len(channel) and 0 <= x + right < len(row):
                    found.append(value - channel[y + down][x + right])
    return found


def test_tv_is_a_norm_over_the_whole_batch_in_each_direction() -> None:
    x = pictures()
    expected = sum(
        math.sqrt(sum(d * d for image in x.tolist() for d in differences(image, direction))) for direction in DIRECTIONS
    )
    assert TERMS["tv"](x).item() == pytest.approx(expected, rel=1e-12)
    alone = sum(TERMS["tv"](x[n : n + 1]).item() for n in range(len(x)))
    assert expected < alone - 0.1  # norms of the parts add up to more


def test_tv_of_a_batch_is_that_of_its_summed_parts() -> None:
    x = pictures()
    squares = priors.tv_squares(x[:1]) + priors.tv_squares(x[1:])
    assert priors.tv(squares).item() == pytest.approx(TERMS["tv"](x).item(), rel=1e-12)


def test_l1_and_l2_by_value() -> None:
    x = pictures()
    means = [
        sum(sum(map(abs, d)) / len(d) for d in (differences(image, way) for way in DIRECTIONS)) for image in x.tolist()
    ]
    assert priors.tv_l1(x).tolist() == pytest.approx(means, rel=1e-12)
    norms = [math.sqrt(sum(v * v for c in image for row in c for v in row)) for image in x.tolist()]
    assert priors.l2(x).tolist() == pytest.approx(norms, rel=1e-12)
    assert priors.l2_squares(x).tolist() == pytest.approx([n * n for n in norms], rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_against_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(TERMS[name], (pictures(1).requires_grad_(),))


@pytest.mark.parametrize("name", TERMS)
def test_a_step_down_the_gradient_makes_images_smoother_or_darker(name: str) -> None:
    x = pictures(2).requires_grad_()
    before = TERMS[name](x).sum()
    before.backward()
    after = TERMS[name](x.detach() - 1e-3 * x.grad).sum()
    assert after < before


@pytest.mark.parametrize("name", TERMS)
def test_flat_and_black_images_have_a_finite_gradient(name: str) -> None:
    x = torch.zeros(2, 1, 3, 3, requires_grad=True)
    TERMS[name](x).sum().backward()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("name", TERMS)
def test_no_images_are_no_error(name: str) -> None:
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = TERMS[name](x).sum()
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("name", ["tv", "tv_l1"])
def test_a_single_row_has_no_neighbours(name: str) -> None:
    with pytest.raises(ValueError, match="2 x 2"):
        TERMS[name](torch.zeros(1, 1, 1, 4))


def test_half_precision_is_summed_in_fp32() -> None:
    x = torch.full((1, 3, 64, 64), 8.0, dtype=torch.float16)
    assert priors.l2_squares(x).item() == 64 * 3 * 64 * 64  # more than float16 holds
    assert priors.tv_squares(x).dtype == torch.float32
