"""The weighted sum of terms and the mean over the global batch."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses.weighted import Losses, global_mean, weighted


def never() -> Tensor:
    raise AssertionError("a term with weight 0 was computed")


def test_total_is_the_weighted_sum_with_its_gradient() -> None:
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    losses = weighted({"kl": lambda: x.square(), "vid": lambda: x.exp()}, {"vid": 0.5, "kl": 2.0})
    losses.total.backward()
    assert losses.total.item() == pytest.approx(2 * 9 + 0.5 * math.exp(3), rel=1e-12)
    assert x.grad.item() == pytest.approx(2 * 6 + 0.5 * math.exp(3), rel=1e-12)
    assert losses.formula() == "2.0*kl + 0.5*vid"  # the order of the terms, not of the weights
    assert list(losses.terms) == ["kl", "vid"]


def test_terms_of_weight_zero_or_none_are_not_computed() -> None:
    terms = {"kl": lambda: torch.tensor(1.0), "vid": never, "at": never}
    losses = weighted(terms, {"kl": 1, "vid": 0.0})
    assert list(losses.terms) == ["kl"] and losses.formula() == "1.0*kl" and losses.weights == {"kl": 1.0}


def test_no_terms_have_no_total() -> None:
    losses = weighted({"kl": never}, {"kl": 0.0})
    assert losses.formula() == "0" and losses.nonfinite() == []
    with pytest.raises(ValueError, match="at least one term"):
        _ = losses.total


def test_unknown_weight_names_the_nearest_term() -> None:
    with pytest.raises(ValueError, match="weights: unknown name 'bnn'; nearest: bn.*allowed: bce, bn, ice"):
        weighted({"bn": never, "ice": never, "bce": never}, {"bnn": 0.0})


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf])
def test_weights_must_be_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(ValueError, match="weights.kl"):
        weighted({"kl": never}, {"kl": weight})


def test_a_vector_term_is_refused() -> None:
    with pytest.raises(ValueError, match="term 'kl'"):
        weighted({"kl": lambda: torch.zeros(3)}, {"kl": 1.0})


def test_a_term_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="'kl'"):
        Losses(terms={"kl": torch.tensor(1.0)}, weights={}, report={})


def test_report_is_detached_and_apart() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    losses = weighted({"kl": lambda: x * 3}, {"kl": 1.0}, {"accuracy": x * 5})
    assert not losses.report["accuracy"].requires_grad and losses.total.item() == 6
    with pytest.raises(ValueError, match="report: 'kl'"):
        weighted({"kl": lambda: x * 3}, {"kl": 1.0}, {"kl": x})


def test_nonfinite_names_the_terms() -> None:
    values = {"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 0.0}
    losses = weighted({k: lambda v=v: torch.tensor(v) for k, v in values.items()}, dict.fromkeys(values, 1.0))
    assert losses.nonfinite() == ["b", "c", "d"]


def test_global_mean_divides_by_the_global_count() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    assert global_mean(values, 12.0).item() == pytest.approx(0.5)
    assert global_mean(values, torch.tensor(12.0)).item() == pytest.approx(0.5)
    assert global_mean(values, 4, torch.tensor([True, False, True])).item() == pytest.approx(1.0)
    assert global_mean(values, 4, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("cut", [0, 1, 4, 6])
def test_local_parts_add_up_to_the_mean_of_the_whole(cut: int) -> None:
    x = torch.arange(6, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    (whole,) = torch.autograd.grad(global_mean(x.square(), 4, mask), x)
    parts = [global_mean(x[s].square(), 4, mask[s]) for s in (slice(0, cut), slice(cut, 6))]
    (split,) = torch.autograd.grad(sum(parts), x)
    assert torch.equal(whole, split)
    assert sum(parts).item() == pytest.approx((0 + 1 + 9 + 25) / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_slots_leak_into_neither_value_nor_gradient(bad: float) -> None:
    values = torch.tensor([1.0, bad, 3.0], requires_grad=True)
    mean = global_mean(values, 2.0, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0 and values.grad.tolist() == [0.5, 0.0, 0.5]


def test_global_mean_computes_half_precision_in_fp32() -> None:
    values = torch.ones(1000, dtype=torch.bfloat16)
    assert global_mean(values, 1000.0).dtype is torch.float32 and global_mean(values, 1000.0).item() == 1.0


@pytest.mark.parametrize("count", [0.0, -1.0, math.nan])
def test_count_must_be_positive(count: float) -> None:
    with pytest.raises(ValueError, match="count"):
        global_mean(torch.zeros(2), count)


def test_a_count_tensor_of_zero_shows_as_nonfinite() -> None:
    mean = global_mean(torch.zeros(2), torch.tensor(0.0), torch.zeros(2))
    assert weighted({"kl": lambda: mean}, {"kl": 1.0}).nonfinite() == ["kl"]


def test_global_mean_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="values_N"):
        global_mean(torch.zeros(2, 2), 4.0)
    with pytest.raises(ValueError, match="mask_N"):
        global_mean(torch.zeros(2), 4.0, torch.ones(1))
