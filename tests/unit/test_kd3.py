"""KD3's objective against plain numbers, and the perturbed images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.config import KD3Spec, RecipeError, parse
from dfkd_dist.engine.student_side import StudentSide
from dfkd_dist.losses import kd3 as losses
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.shared_classifier import share_classifier
from dfkd_dist.models.signals import FEATURES, LOGITS, Batch, Need, Signals
from dfkd_dist.objectives.kd3 import KD3, needed
from dfkd_dist.objectives.registry import Context
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.views import PartnerViews
from tests.unit.test_losses_kd3 import naive_contrast, naive_weight
from tests.unit.test_shared_classifier import BOTH, CLASSES, card, images, network, teacher

# ------------------------------------------------------------------------------------------ the objective


class Case:
    """A student, a teacher and a batch of two versions, with plain numbers beside them."""

    def __init__(self, count: int = 6, **spec: Any) -> None:
        self.spec = parse(KD3Spec, {"kind": "kd3", "head": 7, **spec})
        self.teacher, self.student = teacher("tiny"), network(card("tiny"), seed=5)
        if self.spec.shares_classifier:
            share_classifier(self.student, self.teacher)
        shapes = {LOGITS: (CLASSES,), FEATURES: (96,)}
        torch.manual_seed(11)
        self.objective = KD3(self.spec, Context([1.0], shapes, [shapes], CLASSES)).double()
        self.side = StudentSide(self.student, self.objective)
        views = self.spec.views
        self.images = torch.cat([images(seed, count) for seed in range(views)])
        self.batch = Batch(self.images, count, views=views)
        self.answers = [self.teacher(self.images, needed(self.spec))]

    def losses(self) -> Losses:
        return self.side(self.batch, self.answers)

    def said(self) -> list[Signals]:
        """The student's signals about each version, as the objective hears them (batch norm goes by the batch)."""
        return [self.student(part, BOTH) for part in self.images.tensor_split(self.spec.views)]

    def embedded(self, head: nn.Linear, signals: Signals) -> Tensor:
        return head(signals.tensor(FEATURES).detach()).detach()


def naive_terms(case: Case, reduction: str) -> dict[str, float]:
    """Eqs. 9 to 17 in plain numbers, for two versions."""
    (clean, perturbed), count = case.said(), case.batch.count
    told, told_hat = case.answers[0].views(2)
    wfa = 0.0
    for i in range(count):
        weight = naive_weight(told.logits_NC[i].tolist(), clean.logits_NC[i].tolist())
        errors = [(a - b) ** 2 for a, b in zip(features_of(clean, i), features_of(told, i), strict=True)]
        wfa += weight * sum(errors) / len(errors) / count
    scale = 1.0 if reduction == "sum" else 1 / count
    of_s, of_t = case.objective.student_head, case.objective.teacher_head
    z_s, zh_s = case.embedded(of_s, clean), case.embedded(of_s, perturbed)
    z_t, zh_t = case.embedded(of_t, told), case.embedded(of_t, told_hat)
    tau, denominator = case.spec.temperature, case.spec.denominator
    found = {
        "wfa": wfa,
        "mdcl_student": scale * sum(naive_contrast(z_s, zh_s, tau, denominator)),
        "mdcl_teacher": scale * sum(naive_contrast(z_t, zh_t, tau, denominator)),
    }
    return found | ({"mdcl_cross": scale * sum(naive_contrast(z_s, zh_t, tau, denominator))} if case.spec.cross else {})


def features_of(signals: Signals, i: int) -> list[float]:
    return signals.tensor(FEATURES)[i].tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("denominator", ["others", "all"])
@pytest.mark.parametrize("changes", [{}, {"cross": 0.5}, {"shared_head": True}])
def test_the_terms_are_those_of_the_paper(reduction: str, denominator: str, changes: dict[str, Any]) -> None:
    case = Case(reduction=reduction, denominator=denominator, mdcl=0.25, **changes)
    found, expected = case.losses(), naive_terms(case, reduction)
    assert {name: float(term.detach()) for name, term in found.terms.items()} == pytest.approx(expected, rel=1e-9)
    weights = {"wfa": 1.0, "mdcl_student": 0.25, "mdcl_teacher": 0.25, "mdcl_cross": 0.125}
    total = sum(weights[name] * value for name, value in expected.items())  # Eqs. 17 and 18
    assert found.total.item() == pytest.approx(total, rel=1e-9)
    printed = (expected["mdcl_student"] + expected["mdcl_teacher"]) * (1 if reduction == "sum" else case.batch.count)
    assert float(found.report["mdcl_sum"]) == pytest.approx(printed)
    assert float(found.report["mdcl_mean"]) == pytest.approx(printed / case.batch.count)
    assert 0.119 < float(found.report["instance_weight"]) <= 0.5


def test_the_paper_is_the_default() -> None:
    spec = parse(KD3Spec, {"kind": "kd3"})
    assert (spec.mdcl, spec.temperature, spec.align, spec.perturb) == (0.01, 0.3, 1.0, "mixdistribution")
    assert spec.shares_classifier and spec.views == 2 and not spec.compares_predictions


def test_clean_images_come_first_and_alone() -> None:
    case, seen = Case(), []

    def student(x: Tensor, need: Need) -> Signals:
        seen.append(x)
        return case.student(x, need)

    case.objective(student, case.answers, case.batch)
    assert len(seen) == 2 and torch.equal(torch.cat(seen), case.images) and len(seen[0]) == case.batch.count


def gradients(module: nn.Module) -> dict[str, float]:
    return {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in module.named_parameters()}


def test_the_teachers_contrast_trains_only_the_teachers_head() -> None:
    case = Case()
    case.losses().terms["mdcl_teacher"].backward()
    assert not any(gradients(case.student).values())
    found = gradients(case.objective)
    assert found["teacher_head.weight"] > 0 and found["student_head.weight"] == 0


def test_a_shared_head_is_one_head_and_hears_both() -> None:
    case = Case(shared_head=True)
    assert case.objective.teacher_head is case.objective.student_head
    assert [n for n, _ in case.objective.named_parameters()] == ["student_head.weight", "student_head.bias"]


def test_the_cross_contrast_reaches_the_student() -> None:
    case = Case(cross=1.0)
    case.losses().terms["mdcl_cross"].backward()
    assert gradients(case.objective)["student_head.weight"] > 0 and any(gradients(case.student).values())


def test_instance_weights_are_constants_to_the_gradient() -> None:
    case = Case(mdcl=0.0)
    case.losses().total.backward()
    found = {n: p.grad.clone() for n, p in case.student.named_parameters() if p.grad is not None}
    case.student.zero_grad()
    said, told = case.student(case.images, BOTH), case.answers[0]
    fixed = torch.tensor(
        [naive_weight(t, s) for t, s in zip(told.logits_NC.tolist(), said.logits_NC.tolist(), strict=True)]
    )
    error = (said.tensor(FEATURES) - told.tensor(FEATURES)).square().mean(1)
    (fixed.double() * error).mean().backward()
    for name, parameter in case.student.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-9), name


def test_a_fresh_classifier_learns_one_hot_or_soft_predictions() -> None:
    for kind, temperature in (("hard", 1.0), ("soft", 2.0)):
        case = Case(classifier=kind, classifier_temperature=temperature, classifier_weight=0.5, mdcl=0.0)
        found = case.losses()
        assert set(found.terms) == {"wfa", kind} and found.weights[kind] == 0.5 and case.spec.compares_predictions
        (said,), told = case.said(), case.answers[0].logits_NC
        log_q = (said.logits_NC / temperature).log_softmax(1)
        if kind == "hard":
            expected = F.nll_loss(log_q, told.argmax(1))
        else:
            expected = F.kl_div(log_q, (told / temperature).softmax(1), reduction="batchmean")
        assert float(found.terms[kind].detach()) == pytest.approx(expected.item(), rel=1e-9)
        found.total.backward()
        assert gradients(case.student)["network.fc.weight"] > 0


def test_without_perturbation_an_image_is_contrasted_with_the_others() -> None:
    case = Case(perturb="none", mdcl=1.0)
    assert case.spec.views == 1
    found = case.losses()
    (said,) = case.said()
    z = case.embedded(case.objective.student_head, said)
    expected = sum(naive_contrast(z, z, 0.3, "others")) / 6
    assert found.terms["mdcl_student"].item() == pytest.approx(expected, rel=1e-9)


def test_masked_images_count_for_nothing() -> None:
    whole, masked = Case(5), Case(7)
    keep = torch.tensor([True, True, False, True, True, False, True])
    both = torch.cat([keep, keep])
    masked.images[both] = whole.images
    masked.student.eval(), whole.student.eval()  # batch norm would see the masked images
    answers = [masked.teacher(masked.images, BOTH)]
    found = masked.side(Batch(masked.images, 5, mask_N=keep, views=2), answers)
    expected = whole.losses()
    for name, term in expected.terms.items():
        assert found.terms[name].item() == pytest.approx(term.item(), rel=1e-9)


def test_one_image_alone_has_nothing_to_be_told_from() -> None:
    case = Case(1)
    case.student.eval()
    found = case.losses()
    assert found.terms["mdcl_student"].item() == 0.0
    found.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.side.parameters())


def test_a_step_of_descent_lowers_the_loss() -> None:
    case = Case(12, mdcl=0.1)
    case.student.eval()
    optimizer = torch.optim.SGD([p for p in case.side.parameters() if p.requires_grad], lr=0.02)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        total = case.losses().total
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"align": 0.0, "mdcl": 0.0}, "align and mdcl are 0 and the classifier is frozen"),
        ({"mdcl": 0.0, "cross": 1.0}, "cross is 1 but mdcl, which it is a part of, is 0"),
        ({"perturb": "cutmix"}, "mixdistribution"),
        ({"classifier": "own"}, "shared"),
        ({"temperature": 0.0}, "temperature"),
        ({"delta": 0.0}, "delta"),
        ({"alpha": 0.01}, "alpha"),
    ],
)
def test_a_section_that_cannot_be_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(KD3Spec, {"kind": "kd3", **spec})


def test_a_recipe_that_cannot_be_is_refused() -> None:
    spec = parse(KD3Spec, {"kind": "kd3"})
    spec.check_recipe(teachers=1, source="stream", batch=2)
    with pytest.raises(ValueError, match=r"teachers: objective.kind: kd3 needs exactly 1 .* found 2"):
        spec.check_recipe(teachers=2, source="stream", batch=8)
    with pytest.raises(ValueError, match=r"source.kind is 'generative'; .* only source.kind: stream"):
        spec.check_recipe(teachers=1, source="generative", batch=8)
    with pytest.raises(ValueError, match=r"batch is 1; .* allowed: 2 or more"):
        spec.check_recipe(teachers=1, source="stream", batch=1)
    parse(KD3Spec, {"kind": "kd3", "mdcl": 0.0}).check_recipe(teachers=1, source="generative", batch=1)


def test_networks_that_do_not_fit_are_refused() -> None:
    spec, shapes = parse(KD3Spec, {"kind": "kd3"}), {LOGITS: (5,), FEATURES: (8,)}
    with pytest.raises(ValueError, match="exactly 1 teacher, found 2"):
        KD3(spec, Context([0.5, 0.5], shapes, [shapes, shapes], 5))
    with pytest.raises(ValueError, match="the student's features have width 8, the teacher's 9"):
        KD3(spec, Context([1.0], shapes, [shapes | {FEATURES: (9,)}], 5))
    with pytest.raises(ValueError, match="needs the teacher's features"):
        KD3(spec, Context([1.0], shapes, [{LOGITS: (5,)}], 5))
    apart = parse(KD3Spec, {"kind": "kd3", "classifier": "soft", "align": 0.0})
    KD3(apart, Context([1.0], shapes, [shapes | {FEATURES: (9,)}], 5))  # heads of their own take any width


def test_a_batch_without_the_second_version_is_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match=r"the batch holds 1 version\(s\) of each image, kd3 needs 2"):
        case.side(Batch(case.images, 12), case.answers)


# --------------------------------------------------------------------------------------- perturbed images


def partners(maker: PartnerViews, slots: Tensor, step: int = 0) -> list[int]:
    rows = torch.arange(len(slots), dtype=torch.float64).unsqueeze(1)
    return maker._partners(rows, slots, 0, step).squeeze(1).long().tolist()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_everybody_is_one_others_partner(count: int) -> None:
    maker = PartnerViews("mixdistribution", 0.1, ALONE, Randomness(0), 8)
    circles = set()
    for step in range(20):
        found = partners(maker, torch.arange(count), step)
        assert sorted(found) == list(range(count)) and all(i != j for i, j in enumerate(found))
        at, seen = 0, []
        while at not in seen:
            seen.append(at)
            at = found[at]
        assert len(seen) == count  # one circle
        circles.add(tuple(found))
    assert len(circles) >= {2: 1, 3: 2, 8: 15}[count]


def test_one_image_is_its_own_partner_and_none_is_no_trouble() -> None:
    maker = PartnerViews("mixdistribution", 0.1, ALONE, Randomness(0), 8)
    x = images(1, 1)
    assert torch.allclose(maker(x, torch.tensor([3]), 0, 0)[0], x)
    assert maker(x[:0], torch.zeros(0, dtype=torch.int64), 0, 0)[0].shape == (0, 1, 12, 12)


@pytest.mark.parametrize("kind", ["mixdistribution", "mixup"])
def test_a_perturbed_image_does_not_depend_on_the_order_of_the_batch(kind: str) -> None:
    maker, x, slots = PartnerViews(kind, 0.5, ALONE, Randomness(3), 8), images(1, 6), torch.tensor([0, 2, 3, 4, 6, 7])
    (found,) = maker(x, slots, 1, 2)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(maker(x[order], slots[order], 1, 2)[0], found[order])
    assert not torch.equal(maker(x, slots, 1, 3)[0], found) and not torch.equal(maker(x, slots, 2, 2)[0], found)
    assert (found - x).abs().max() > 1e-3


def test_the_view_is_made_from_partner_and_lambda() -> None:
    randomness, x, slots = Randomness(3), images(1, 5), torch.arange(5)
    shares = randomness.beta("views/lambda", slots, 0.5, 0.5, round=1, step=2)
    mixed, blended = (PartnerViews(kind, 0.5, ALONE, randomness, 5) for kind in ("mixdistribution", "mixup"))
    rows = torch.arange(5, dtype=torch.float64).unsqueeze(1)
    partner = mixed._partners(rows, slots, 1, 2).squeeze(1).long()
    mean, std = losses.channel_statistics(x)
    assert torch.equal(mixed(x, slots, 1, 2)[0], losses.mix_distribution(x, mean[partner], std[partner], shares))
    assert torch.equal(blended(x, slots, 1, 2)[0], losses.mixup(x, x[partner], shares))
