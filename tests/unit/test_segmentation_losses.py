"""Pixel-wise terms against loops over pixels written from the equations, by value, gradient and sign."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import AdversarySpec, BNTermSpec
from dfkd_dist.losses import activation, adversarial, distillation, entropy
from dfkd_dist.losses.distillation import IGNORE
from dfkd_dist.losses.weighted import global_mean
from dfkd_dist.models.signals import Signals
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.sources.terms import GeneratorStep, generator_terms

N, C, H, W = 3, 4, 2, 5


def scores(seed: int) -> Tensor:
    return 2 * torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(values: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(v / tau) for v in values]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def by_pixel(value: Callable[..., float], *maps: Tensor) -> list[float]:
    """For each sample the mean over its pixels of `value(scores of one pixel, ...)`."""
    found = []
    for n in range(N):
        each = [value(*(m[n, :, y, x].tolist() for m in maps)) for y in range(H) for x in range(W)]
        found.append(sum(each) / len(each))
    return found


PER_SAMPLE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[list[float], list[float]], float]]] = {
    "kl": (
        lambda t, s: distillation.kl(distillation.tempered_mean([t], [1.0], 3.0), s, 3.0),
        lambda t, s: kl(softmax(t, 3.0), softmax(s, 3.0)),
    ),
    "reverse_kl": (
        lambda t, s: distillation.reverse_kl(distillation.tempered_mean([t], [1.0], 3.0), s, 3.0),
        lambda t, s: kl(softmax(s, 3.0), softmax(t, 3.0)),
    ),
    "l1": (distillation.l1, lambda t, s: sum(abs(a - b) for a, b in zip(t, s, strict=True)) / C),
    "adversarial kl": (lambda t, s: adversarial.kl(t, s, 3.0), lambda t, s: -kl(softmax(t, 3.0), softmax(s, 3.0))),
    "masked kl": (
        lambda t, s: adversarial.masked_kl(t, s, 3.0),
        lambda t, s: -kl(softmax(t, 3.0), softmax(s, 3.0)) if t.index(max(t)) == s.index(max(s)) else 0.0,
    ),
    "ice": (lambda t, _: entropy.instance_entropy(t), lambda t, _: -sum(p * math.log(p) for p in softmax(t))),
    "oh": (lambda t, _: entropy.one_hot(t), lambda t, _: -math.log(max(softmax(t)))),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_term_is_the_mean_of_its_pixels(name: str) -> None:
    term, naive = PER_SAMPLE[name]
    teacher, student = scores(1), scores(2)
    found = term(teacher, student)
    assert found.shape == (N,)
    assert found.tolist() == pytest.approx(by_pixel(naive, teacher, student), rel=1e-11)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_gradients_against_finite_differences_and_against_single_pixels(name: str) -> None:
    term, _ = PER_SAMPLE[name]
    teacher, student = scores(3).requires_grad_(), scores(4).requires_grad_()
    assert torch.autograd.gradcheck(term, (teacher, student))
    (whole,) = torch.autograd.grad(term(teacher, student).sum(), teacher)
    pixels = [v.detach().movedim(1, -1).reshape(-1, C).requires_grad_() for v in (teacher, student)]
    (single,) = torch.autograd.grad(term(*pixels).sum() / (H * W), pixels[0])
    assert torch.allclose(whole.movedim(1, -1).reshape(-1, C), single, atol=1e-14)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_terms_of_pixels_are_finite_at_extremes(name: str) -> None:
    term, _ = PER_SAMPLE[name]
    extreme = torch.tensor([1e4, -1e4, 0.0, 88.0]).view(1, C, 1, 1).expand(N, C, H, W).clone()
    for other in (extreme, -extreme, torch.zeros_like(extreme)):
        t, s = extreme.clone().requires_grad_(), other.clone().requires_grad_()
        value = term(t, s)
        value.sum().backward()
        assert value.isfinite().all() and all(v.grad is None or v.grad.isfinite().all() for v in (t, s))


def test_a_sample_weighs_one_whatever_its_size() -> None:
    small, large = scores(1)[:1], torch.nn.functional.interpolate(scores(1)[:1], scale_factor=3, mode="nearest")
    assert entropy.instance_entropy(small).item() == pytest.approx(entropy.instance_entropy(large).item())
    halves = [global_mean(entropy.instance_entropy(part), N).item() for part in scores(5).split([1, 2])]
    assert sum(halves) == pytest.approx(entropy.instance_entropy(scores(5)).mean().item())


# --------------------------------------------------------------------------------------------- targets


def test_ensembles_are_made_pixel_by_pixel() -> None:
    teachers, weights = [scores(1), scores(2)], [0.25, 0.75]
    target, mean = distillation.tempered_mean(teachers, weights, 2.0), distillation.mean_logits(teachers, weights)
    probs = torch.stack([distillation.tempered_mean([t], [1.0], 1.0) for t in teachers])
    surest = distillation.lowest_entropy_choice(probs)
    entropies = []
    for n, y, x in ((0, 0, 0), (1, 1, 3), (2, 0, 4)):
        rows = [t[n, :, y, x].tolist() for t in teachers]
        expected = [0.25 * a + 0.75 * b for a, b in zip(*(softmax(r, 2.0) for r in rows), strict=True)]
        assert target[n, :, y, x].tolist() == pytest.approx(expected)
        assert mean[n, :, y, x].tolist() == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(*rows, strict=True)])
        each = [-sum(p * math.log(p) for p in softmax(r)) for r in rows]
        entropies.append(each.index(min(each)))
        assert surest[n, :, y, x].tolist() == pytest.approx(softmax(rows[entropies[-1]]))
    choice = (probs == surest).all(dim=2)
    assert 0 < int(choice[0].sum()) < N * H * W  # no teacher answers for all pixels


# ---------------------------------------------------------------------------------------- cross-entropy


def labels() -> Tensor:
    found = torch.randint(0, C, (N, H, W), generator=torch.Generator().manual_seed(9))
    found[0, 0, :3], found[1] = IGNORE, IGNORE
    return found


def test_cross_entropy_is_a_mean_over_valid_pixels() -> None:
    logits, truth = scores(6).requires_grad_(), labels()
    found = distillation.cross_entropy(logits, truth)
    for n in range(N):
        places = [(y, x) for y in range(H) for x in range(W) if truth[n, y, x] != IGNORE]
        each = [-math.log(softmax(logits[n, :, y, x].tolist())[truth[n, y, x]]) for y, x in places]
        assert found[n].item() == pytest.approx(sum(each) / len(each) if each else 0.0, rel=1e-12)
    assert found[1].item() == 0.0  # nothing to learn from, and still one of the batch
    found.sum().backward()
    assert logits.grad is not None and logits.grad[1].eq(0).all() and logits.grad[0, :, 0, :3].eq(0).all()
    assert (logits.grad[2].abs().sum(0) > 0).all()
    assert torch.autograd.gradcheck(lambda x: distillation.cross_entropy(x, truth), (scores(7).requires_grad_(),))


def test_ignored_pixels_may_hold_anything() -> None:
    logits = scores(6)
    with torch.no_grad():
        logits[1] = torch.nan
    logits.requires_grad_()
    value = distillation.cross_entropy(logits, labels())
    assert value.isfinite().all()


def test_255_is_a_class_of_images_and_none_of_pixels() -> None:
    wide = torch.zeros(2, 300)
    wide[:, 255] = 5.0
    assert distillation.cross_entropy(wide, torch.tensor([255, 255])).max() < 2.0
    with pytest.raises(ValueError, match="at most 255 classes, found 300"):
        distillation.cross_entropy(torch.zeros(1, 300, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(N, H), (N, 1, H, W), (N,), (N + 1, H, W)])
def test_labels_must_fit_the_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="labels_N and logits_NC"):
        distillation.cross_entropy(scores(1), torch.zeros(shape, dtype=torch.int64))


# -------------------------------------------------------------------------------------- a generator's terms


def test_a_generators_terms_on_pixels() -> None:
    teacher, other = scores(1), scores(2)
    features = scores(3)
    step = GeneratorStep(Signals(teacher, features), other, N, ALONE, 1)
    terms = generator_terms(step, BNTermSpec(), AdversarySpec(against="student", form="log_l1"))
    mean_p = [sum(by_pixel(lambda t, c=c: softmax(t)[c], teacher)) / N for c in range(C)]  # type: ignore[misc]
    assert terms["bce"]().item() == pytest.approx(sum(p * math.log(p) for p in mean_p), rel=1e-11)
    l1 = sum(by_pixel(PER_SAMPLE["l1"][1], teacher, other)) / N
    assert terms["adv"]().item() == pytest.approx(-math.log(l1 + 1), rel=1e-12)
    assert terms["act"]().item() == pytest.approx(-float(features.abs().mean()), rel=1e-12)
    assert terms["act"]().item() == pytest.approx(activation.activation(features).mean().item())


def test_a_step_on_log_l1_makes_the_networks_disagree() -> None:
    teacher, student = scores(1), scores(2).requires_grad_()
    before = distillation.l1(teacher, student).mean()
    (gradient,) = torch.autograd.grad(adversarial.log_l1(before), student)
    after = distillation.l1(teacher, student.detach() - gradient).mean()
    assert after > before
    # d/dx -log(1 + L1) = -sign / (1 + L1) / count, alike for all images.
    assert torch.allclose(gradient, -torch.sign(student.detach() - teacher) / (1 + before.detach()) / teacher.numel())
