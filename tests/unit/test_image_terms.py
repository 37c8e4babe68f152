"""DeepInversion's further terms by name, on a whole batch and as shares of its slices."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import AdversarySpec, BNTermSpec, CompetitionSpec, DeepInversionLossSpec
from dfkd_dist.models.signals import LayerStatistics, Signals
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.sources.terms import GeneratorStep, generator_terms, image_terms

N, C = 6, 4


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step(**changes: Any) -> GeneratorStep:
    given: dict[str, Any] = {
        "teacher": Signals(2 * _random(N, C, seed=1)),
        "other_NC": 2 * _random(N, C, seed=3),
        "count": N,
        "sync": ALONE,
        "replicas": 1,
        "labels_N": torch.arange(N) % C,
        "pixels_NCHW": _random(N, 3, 5, 5, seed=4),
    }
    return GeneratorStep(**given | changes)


def _naive(step: GeneratorStep, tau: float, over: str) -> dict[str, Tensor]:
    """As DeepInversion's code computes them on a whole batch."""
    x, z, s = step.pixels_NCHW, step.teacher.logits_NC, step.other_NC
    assert x is not None and s is not None and step.labels_N is not None
    ways = [x[..., :-1] - x[..., 1:], x[..., :-1, :] - x[..., 1:, :]]
    ways += [x[..., 1:, :-1] - x[..., :-1, 1:], x[..., :-1, :-1] - x[..., 1:, 1:]]
    p, q = (s / tau).softmax(1), (z / tau).softmax(1)
    m = (0.5 * (p + q)).clamp(0.01, 0.99)
    p, q = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99)
    js = 0.5 * ((m * (m / p).log()).sum() + (m * (m / q).log()).sum()) / N
    return {
        "ce": -z.softmax(1)[torch.arange(N), step.labels_N].log().mean(),
        "tv": sum((d.norm() for d in ways), torch.zeros((), dtype=torch.float64)),
        "tv_l1": sum((d.abs().mean() for d in ways), torch.zeros((), dtype=torch.float64)),
        "l2": x.flatten(1).norm(dim=1).mean() if over == "image" else x.norm(),
        "js": 1 - js.clamp(0, 1),
    }


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_every_term_as_released(over: Literal["image", "batch"], tau: float) -> None:
    step = _step()
    terms, expected = image_terms(step, CompetitionSpec(temperature=tau), over), _naive(step, tau, over)
    assert terms.keys() == expected.keys() == DeepInversionLossSpec().weights().keys() - {"bn"}
    for name, compute in terms.items():
        assert compute().item() == pytest.approx(expected[name].item(), abs=1e-12), name


def test_the_port_minimises_minus_js() -> None:
    step = _step()
    clamped = image_terms(step, CompetitionSpec(), "image")["js"]()
    negative = image_terms(step, CompetitionSpec(form="negative"), "image")["js"]()
    assert negative.item() == pytest.approx(clamped.item() - 1, abs=1e-12)


def test_a_part_of_the_batch_counts_for_its_part() -> None:
    """Where a rank stands alone (`sync: local`) its batch-coupled terms are its own, and count by their share."""
    whole = image_terms(_step(), CompetitionSpec(), "image")
    half = image_terms(_step(count=2 * N, replicas=2), CompetitionSpec(), "image")
    for name, compute in half.items():
        assert compute().item() == pytest.approx(whole[name]().item() / 2, abs=1e-12), name


def test_the_first_layers_factor() -> None:
    layers = [
        LayerStatistics(_random(c, seed=c), _random(c, seed=c + 9).abs(), torch.zeros(c).double(), torch.ones(c))
        for c in (2, 3)
    ]
    step = _step(teacher=Signals(_random(N, C, seed=1), bn=layers))

    def value(first: float) -> float:
        spec = BNTermSpec(form="l2", first_layer=first)
        return generator_terms(step, spec, AdversarySpec())["bn"]().item()

    of_first = sum((a - b).norm().item() for a, b in ((layers[0].mean_C, 0.0), (layers[0].var_C, 1.0)))
    assert value(10.0) - value(1.0) == pytest.approx(9 * of_first, rel=1e-12)
