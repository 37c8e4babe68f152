"""KD3's losses and its choice of images against loops written from the paper's equations."""

import math

import pytest
import torch
from torch import Tensor

from dfkd_dist.losses import kd3, kd3_selection


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


# -------------------------------------------------------------------------------- Eqs. 9 and 10: alignment


def naive_weight(teacher: list[float], student: list[float]) -> float:
    distance = sum(abs(s - t) for s, t in zip(softmax(student), softmax(teacher), strict=True))
    return 1 - 1 / (1 + math.exp(-distance))


def test_weights_are_those_of_eq_9() -> None:
    teacher, student = 3 * normal(1, 6, 4), 3 * normal(2, 6, 4)
    found = kd3.instance_weights(teacher, student)
    expected = [naive_weight(t, s) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_weights_lie_between_full_disagreement_and_agreement_and_carry_no_gradient() -> None:
    logits = torch.tensor([[50.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.0, 50.0], [1.0, 2.0]], dtype=torch.float64)
    found = kd3.instance_weights(other, logits)
    assert found.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-2)), 0.5])
    assert not found.requires_grad


def test_alignment_is_eq_10_and_pulls_towards_the_teacher() -> None:
    weights, student, teacher = uniform(1, 5), normal(2, 5, 3), normal(3, 5, 3)
    student.requires_grad_()
    found = kd3.weighted_alignment(weights, student, teacher)
    for i in range(5):
        error = sum((student[i, d].item() - teacher[i, d].item()) ** 2 for d in range(3)) / 3
        assert found[i].item() == pytest.approx(weights[i].item() * error, rel=1e-12)
    found.sum().backward()
    expected = 2 / 3 * weights.unsqueeze(1) * (student.detach() - teacher)
    assert torch.allclose(student.grad, expected, rtol=1e-12)


def test_features_of_unequal_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student_ND and teacher_ND must have one shape"):
        kd3.weighted_alignment(torch.ones(2), torch.ones(2, 3), torch.ones(2, 4))


# ----------------------------------------------------------------------------- Eqs. 11 and 12: perturbation


def naive_statistics(image: Tensor, eps: float) -> tuple[list[float], list[float]]:
    means, deviations = [], []
    for channel in image.tolist():
        values = [value for row in channel for value in row]
        mean = sum(values) / len(values)
        means.append(mean)
        deviations.append(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps))
    return means, deviations


def test_mix_distribution_is_eqs_11_and_12() -> None:
    images, lambdas, partner = uniform(1, 4, 2, 3, 5), uniform(2, 4), [2, 0, 3, 1]
    mean, std = kd3.channel_statistics(images)
    found = kd3.mix_distribution(images, mean[partner], std[partner], lambdas)
    for i in range(4):
        (mu, sigma), (mu_p, sigma_p) = (naive_statistics(images[j], kd3.VARIANCE_EPS) for j in (i, partner[i]))
        share = lambdas[i].item()
        for c in range(2):
            gamma = share * sigma[c] + (1 - share) * sigma_p[c]
            beta = share * mu[c] + (1 - share) * mu_p[c]
            for h in range(3):
                for w in range(5):
                    expected = gamma * (images[i, c, h, w].item() - mu[c]) / sigma[c] + beta
                    assert found[i, c, h, w].item() == pytest.approx(expected, rel=1e-12)


def test_a_perturbed_image_has_mixed_statistics() -> None:
    images = uniform(1, 2, 3, 8, 8) * torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
    mean, std = kd3.channel_statistics(images, eps=0.0)
    swapped = [1, 0]
    for share in (0.0, 0.3, 1.0):
        lambdas = torch.full((2,), share, dtype=torch.float64)
        found = kd3.mix_distribution(images, mean[swapped], std[swapped], lambdas, eps=0.0)
        new_mean, new_std = kd3.channel_statistics(found, eps=0.0)
        assert torch.allclose(new_mean, share * mean + (1 - share) * mean[swapped])
        assert torch.allclose(new_std, share * std + (1 - share) * std[swapped])
    assert torch.allclose(found, images)  # lambda = 1


def test_perturbation_does_not_ask_whether_images_are_normalised_before_or_after() -> None:
    images, lambdas, partner = uniform(1, 3, 1, 6, 6), uniform(2, 3), [1, 2, 0]

    def perturbed(x: Tensor) -> Tensor:
        mean, std = kd3.channel_statistics(x, eps=0.0)
        return kd3.mix_distribution(x, mean[partner], std[partner], lambdas, eps=0.0)

    assert torch.allclose(perturbed((images - 0.4) / 0.2), (perturbed(images) - 0.4) / 0.2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_images_stay_finite(dtype: torch.dtype) -> None:
    images = torch.full((2, 3, 4, 4), 0.5, dtype=dtype)
    images[1] = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    images.requires_grad_()
    mean, std = kd3.channel_statistics(images)
    found = kd3.mix_distribution(images, mean[[1, 0]], std[[1, 0]], torch.tensor([0.5, 0.5]))
    found.sum().backward()
    assert found.dtype == dtype and found.isfinite().all() and images.grad.isfinite().all()
    assert torch.allclose(found[0].float(), ((mean[0] + mean[1]) / 2).view(3, 1, 1).expand(3, 4, 4).float(), atol=1e-2)


def test_mixup_is_a_convex_mixture() -> None:
    images, partners, lambdas = uniform(1, 3, 2, 2, 2), uniform(2, 3, 2, 2, 2), uniform(3, 3)
    found = kd3.mixup(images, partners, lambdas)
    for i in range(3):
        share = lambdas[i].item()
        assert torch.allclose(found[i], share * images[i] + (1 - share) * partners[i], rtol=1e-12)


# ------------------------------------------------------------------------------------ Eqs. 13 to 16: contrast


def test_embeddings_have_length_one() -> None:
    found = kd3.embedding(normal(1, 5, 7))
    assert torch.allclose(found.norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=1e-12)
    projected = normal(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(kd3.embedding, (projected,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_zero_vector_has_a_zero_embedding_and_a_zero_gradient(dtype: torch.dtype) -> None:
    projected = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 2.0]], dtype=dtype, requires_grad=True)
    found = kd3.embedding(projected)
    (found * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert found[0].tolist() == [0.0] * 3 and found[1].tolist() == pytest.approx([1 / 3, -2 / 3, 2 / 3])
    assert projected.grad[0].tolist() == [0.0] * 3 and projected.grad.isfinite().all() and projected.grad[1].any()


def naive_contrast(clean: Tensor, perturbed: Tensor, tau: float, denominator: str) -> list[float]:
    """Eq. 15, cosine similarity and all."""

    def cosine(a: list[float], b: list[float]) -> float:
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length

    rows, columns = clean.tolist(), perturbed.tolist()
    values = []
    for i, a in enumerate(rows):
        below = sum(math.exp(cosine(a, b) / tau) for j, b in enumerate(columns) if j != i or denominator == "all")
        values.append(-math.log(math.exp(cosine(a, columns[i]) / tau) / below))
    return values


def contrast(clean: Tensor, perturbed: Tensor, tau: float = 0.3, denominator: str = "others") -> Tensor:
    scores = kd3.similarity(kd3.embedding(clean), kd3.embedding(perturbed))
    return kd3.contrast(scores, tau, denominator)


@pytest.mark.parametrize("denominator", kd3.DENOMINATORS)
@pytest.mark.parametrize("tau", [0.1, 0.3, 1.0])
def test_contrast_is_eq_15(denominator: str, tau: float) -> None:
    clean, perturbed = normal(1, 6, 4), normal(2, 6, 4)
    found = contrast(clean, perturbed, tau, denominator)
    assert found.tolist() == pytest.approx(naive_contrast(clean, perturbed, tau, denominator), rel=1e-11)


def test_the_printed_denominator_holds_no_positive_so_the_loss_can_be_negative() -> None:
    clean = torch.eye(3, dtype=torch.float64)
    printed, usual = (contrast(clean, clean, 0.3, denominator) for denominator in kd3.DENOMINATORS)
    assert printed.tolist() == pytest.approx([math.log(2) - 1 / 0.3] * 3) and (printed < 0).all()
    assert usual.tolist() == pytest.approx([math.log(2 + math.exp(1 / 0.3)) - 1 / 0.3] * 3) and (usual > 0).all()


@pytest.mark.parametrize("denominator", kd3.DENOMINATORS)
def test_contrast_gradients_against_finite_differences(denominator: str) -> None:
    clean, perturbed = normal(1, 4, 3).requires_grad_(), normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, 0.3, denominator), (clean, perturbed))


@pytest.mark.parametrize("denominator", kd3.DENOMINATORS)
def test_descent_brings_the_two_versions_together_and_others_apart(denominator: str) -> None:
    scores = normal(1, 5, 5).tanh().requires_grad_()
    kd3.contrast(scores, 0.3, denominator).sum().backward()
    own = torch.eye(5, dtype=torch.bool)
    assert (scores.grad[own] < 0).all() and (scores.grad[~own] > 0).all()


def test_masked_images_neither_count_nor_are_contrasts() -> None:
    clean, perturbed, mask = normal(1, 5, 4), normal(2, 5, 4), torch.tensor([True, False, True, True, False])
    scores = kd3.similarity(kd3.embedding(clean), kd3.embedding(perturbed)).requires_grad_()
    found = kd3.contrast(scores, 0.3, "others", mask)
    assert found[mask].tolist() == pytest.approx(naive_contrast(clean[mask], perturbed[mask], 0.3, "others"))
    assert found[~mask].tolist() == [0.0, 0.0]
    found.sum().backward()
    assert not scores.grad[~mask].any() and not scores.grad[:, ~mask].any()


@pytest.mark.parametrize("mask", [[True], [True, False, False], [False, False]])
@pytest.mark.parametrize("denominator", kd3.DENOMINATORS)
def test_an_image_with_nothing_to_be_told_from_adds_nothing(mask: list[bool], denominator: str) -> None:
    scores = normal(1, len(mask), len(mask)).requires_grad_()
    found = kd3.contrast(scores, 0.3, denominator, torch.tensor(mask))
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0] * len(mask)) and scores.grad.isfinite().all()
    assert not scores.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contrast_is_finite_at_small_temperatures(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=dtype, requires_grad=True)
    found = kd3.contrast(scores, 1e-3)
    found.sum().backward()
    assert found.isfinite().all() and scores.grad.isfinite().all()
    assert found.tolist() == pytest.approx([-2000.0, 2000.0])


def test_similarity_keeps_full_precision_under_autocast() -> None:
    a, b = kd3.embedding(normal(1, 8, 16).float()), kd3.embedding(normal(2, 8, 16).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd3.similarity(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, a @ b.T)


def test_contrast_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="one shape"):
        kd3.contrast(normal(1, 3, 2), 0.3)
    with pytest.raises(ValueError, match="denominator: unknown name 'other'; nearest: others"):
        kd3.contrast(normal(1, 2, 2), 0.3, "other")
    with pytest.raises(ValueError, match="temperature"):
        kd3.contrast(normal(1, 2, 2), 0.0)


# ------------------------------------------------------------------------------- Eqs. 3 to 8: choosing images


def test_alpha_grows_from_almost_nothing_to_one_at_half_of_the_epochs() -> None:
    assert kd3_selection.alpha(0, 240) == pytest.approx(math.exp(-5))
    assert kd3_selection.alpha(60, 240) == pytest.approx(math.exp(-5 * 0.25))
    assert kd3_selection.alpha(120, 240) == 1.0 and kd3_selection.alpha(121, 240) == 1.0
    values = [kd3_selection.alpha(t, 240) for t in range(241)]
    assert values == sorted(values) and values[-1] == 1.0
    with pytest.raises(ValueError, match="epochs: expected a finite number > 0, found 0"):
        kd3_selection.alpha(0, 0)


def naive_choice(
    teacher: Tensor, student: Tensor, alpha: float, v_th: float, counts: str
) -> tuple[list[int], list[float], list[float], list[bool]]:
    """Eqs. 3 and 5 to 8 in plain numbers."""
    classes = teacher.shape[1]
    labels, confidences = [], []
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        mixed = [(1 - alpha) * a + alpha * b for a, b in zip(t, s, strict=True)]
        labels.append(mixed.index(max(mixed)))
        confidences.append(max(mixed))
    counted = [counts == "all" or p > v_th for p in confidences]
    numbers = [sum(1 for y, n in zip(labels, counted, strict=True) if n and y == c) for c in range(classes)]
    limits = [n / max(max(numbers), 1) * v_th for n in numbers]
    return labels, confidences, limits, [p > limits[y] for y, p in zip(labels, confidences, strict=True)]


@pytest.mark.parametrize("counts", kd3_selection.COUNTS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("v_th", [0.0, 0.6, 0.95])
def test_the_choice_is_that_of_eqs_3_to_8(counts: str, alpha: float, v_th: float) -> None:
    # Nobody is predicted to be of the last class.
    shift = torch.tensor([1.0, 0.5, 0.0, -9.0], dtype=torch.float64)
    teacher, student = (torch.softmax(2 * normal(seed, 40, 4) + shift, dim=1) for seed in (1, 2))
    combined = kd3_selection.combine(teacher, student, alpha)
    labels_N, confidence_N = kd3_selection.predict(combined)
    parts = [
        kd3_selection.class_counts(labels_N[p], confidence_N[p], 4, counts, v_th) for p in (slice(7), slice(7, 40))
    ]
    limits_C = kd3_selection.thresholds(parts[0] + parts[1], v_th)  # counts of two ranks add up
    chosen_N = kd3_selection.select(labels_N, confidence_N, limits_C)
    labels, confidences, limits, chosen = naive_choice(teacher, student, alpha, v_th, counts)
    assert labels_N.tolist() == labels and 3 not in labels
    assert confidence_N.tolist() == pytest.approx(confidences, rel=1e-12)
    assert limits_C.tolist() == pytest.approx(limits, rel=1e-12)
    assert chosen_N.tolist() == chosen


def test_a_class_with_few_predictions_is_met_with_a_low_threshold() -> None:
    labels, confidence = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0.96, 0.9, 0.97, 0.5, 0.5])
    counts = kd3_selection.class_counts(labels, confidence, 3, "all", 0.95)
    limits = kd3_selection.thresholds(counts, 0.95)
    assert counts.tolist() == [4, 1, 0] and limits.tolist() == pytest.approx([0.95, 0.2375, 0.0])
    assert kd3_selection.select(labels, confidence, limits).tolist() == [True, False, True, False, True]


def test_without_a_confident_image_every_image_is_kept() -> None:
    labels, confidence = torch.tensor([0, 1]), torch.tensor([0.5, 0.6])
    limits = kd3_selection.thresholds(kd3_selection.class_counts(labels, confidence, 2, "confident", 0.95), 0.95)
    assert limits.tolist() == [0.0, 0.0]
    assert kd3_selection.select(labels, confidence, limits).all()


def test_an_image_at_its_threshold_is_left_out() -> None:
    labels, confidence = torch.tensor([0]), torch.tensor([0.5])
    assert kd3_selection.select(labels, confidence, torch.tensor([0.5])).tolist() == [False]
    assert kd3_selection.select(labels, torch.tensor([math.nan]), torch.tensor([0.0])).tolist() == [False]


def test_choosing_among_nothing() -> None:
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    limits = kd3_selection.thresholds(kd3_selection.class_counts(none, empty, 3, "all", 0.9), 0.9)
    assert limits.tolist() == [0.0] * 3 and kd3_selection.select(none, empty, limits).shape == (0,)


def test_the_choice_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, found 1.5"):
        kd3_selection.combine(torch.ones(1, 2), torch.ones(1, 2), 1.5)
    with pytest.raises(ValueError, match="counts: unknown name 'every'"):
        kd3_selection.class_counts(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 2, "every", 0.9)
