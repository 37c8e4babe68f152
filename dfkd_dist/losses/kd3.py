"""KD3's losses: weighted feature alignment, MixDistribution and contrast between two versions of each image.

"Distribution Shift Matters for Knowledge Distillation with Webly Collected Images" (Tang et al. 2023), sections
3.3 and 3.4. Everything is per sample, so that the caller divides by the global count (the paper's alignment is a
mean and its contrast a sum; which of them an objective takes is the caller's choice). The contrast needs the
embeddings of the *global* batch.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, log_probs

VARIANCE_EPS = 1e-6
"""Added to an image's variance (MixStyle's value): a flat image has no standard deviation to divide by."""
LENGTH_EPS = 1e-8
"""A vector that is shorter has no direction: its embedding is zero, and so is its gradient."""
DENOMINATORS = ("others", "all")


# ------------------------------------------------------------------------------------------ alignment


def instance_weights(teacher_logits_NC: Tensor, student_logits_NC: Tensor) -> Tensor:
    """``w_i = 1 - sigmoid(||N_S(x_i) - N_T(x_i)||_1)`` of probabilities, ``[N]``, from 0.119 to 0.5 (Eq. 9).

    Without gradient: otherwise a student would lower its loss by disagreeing.
    """
    _checks.same_shape("teacher_logits_NC", teacher_logits_NC, "student_logits_NC", student_logits_NC)
    teacher_NC = log_probs("teacher_logits_NC", teacher_logits_NC.detach()).exp()
    student_NC = log_probs("student_logits_NC", student_logits_NC.detach()).exp()
    return 1.0 - torch.sigmoid((student_NC - teacher_NC).abs().sum(dim=1))


def weighted_alignment(weights_N: Tensor, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """``w_i * mean_d (phi_S(x_i) - phi_T(x_i))^2`` per sample, ``[N]`` (Eq. 10 before its mean over images).

    Raises:
        ValueError: unequal shapes: features of unequal width need a projector first.
    """
    _checks.dims("weights_N", weights_N, 1)
    _checks.dims("student_ND", student_ND, 2)
    _checks.same_shape("student_ND", student_ND, "teacher_ND", teacher_ND)
    error_ND = at_least_fp32(student_ND) - at_least_fp32(teacher_ND)
    return weights_N * error_ND.square().mean(dim=1)


# ------------------------------------------------------------------------------------------ perturbation


def channel_statistics(images_NCHW: Tensor, eps: float = VARIANCE_EPS) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image and channel over its pixels, each ``[N, C]``, at least fp32.

    The deviation is ``sqrt(var + eps)``, var biased.
    """
    _checks.dims("images_NCHW", images_NCHW, 4)
    images_NCHW = at_least_fp32(images_NCHW)
    mean_NC = images_NCHW.mean(dim=(2, 3))
    var_NC = (images_NCHW - _pixels(mean_NC)).square().mean(dim=(2, 3))
    return mean_NC, (var_NC + eps).sqrt()


def mix_distribution(
    images_NCHW: Tensor,
    partner_mean_NC: Tensor,
    partner_std_NC: Tensor,
    lambda_N: Tensor,
    eps: float = VARIANCE_EPS,
) -> Tensor:
    """Images with statistics between their own and a partner's (MixDistribution, Eqs. 11 and 12).

    ``gamma (x - mu(x)) / sigma(x) + beta`` with gamma and beta mixed from the two deviations and means: all of
    its own at lambda = 1 (the image itself), all of the partner's at 0. The result can leave [0, 1]. It does not
    matter whether images are normalised before or after.

    Args:
        images_NCHW: images.
        partner_mean_NC: from :func:`channel_statistics` of each image's partner.
        partner_std_NC: likewise.
        lambda_N: each image's own share, from 0 to 1.
        eps: as for the partner's statistics.

    Returns:
        The same shape and type as the images.
    """
    mean_NC, std_NC = channel_statistics(images_NCHW, eps)
    _checks.dims("lambda_N", lambda_N, 1)
    _checks.same_shape("mean_NC", mean_NC, "partner_mean_NC", partner_mean_NC)
    _checks.same_shape("std_NC", std_NC, "partner_std_NC", partner_std_NC)
    own_N1 = lambda_N.to(mean_NC.dtype).unsqueeze(1)
    gamma_NC = own_N1 * std_NC + (1.0 - own_N1) * partner_std_NC.to(mean_NC.dtype)
    beta_NC = own_N1 * mean_NC + (1.0 - own_N1) * partner_mean_NC.to(mean_NC.dtype)
    normal_NCHW = (at_least_fp32(images_NCHW) - _pixels(mean_NC)) / _pixels(std_NC)
    return (_pixels(gamma_NC) * normal_NCHW + _pixels(beta_NC)).to(images_NCHW.dtype)


def mixup(images_NCHW: Tensor, partners_NCHW: Tensor, lambda_N: Tensor) -> Tensor:
    """``lambda x + (1 - lambda) x'`` per image (Zhang et al. 2018): what Table 2's "No MD" perturbs by."""
    _checks.dims("lambda_N", lambda_N, 1)
    _checks.same_shape("images_NCHW", images_NCHW, "partners_NCHW", partners_NCHW)
    own_N111 = lambda_N.to(images_NCHW.dtype).view(-1, 1, 1, 1)
    return own_N111 * images_NCHW + (1.0 - own_N111) * partners_NCHW


def _pixels(value_NC: Tensor) -> Tensor:
    return value_NC[:, :, None, None]


# --------------------------------------------------------------------------------------------- contrast


def embedding(projected_NE: Tensor) -> Tensor:
    """Vectors of length 1, ``[N, E]`` in at least fp32 (Eqs. 13 and 14, after the linear head)."""
    _checks.dims("projected_NE", projected_NE, 2)
    projected_NE = at_least_fp32(projected_NE)
    length_N1 = projected_NE.detach().norm(dim=1, keepdim=True)
    # The same as a zero vector, but with a norm whose gradient there is finite.
    safe_NE = torch.where(length_N1 > LENGTH_EPS, projected_NE, torch.ones_like(projected_NE))
    unit_NE = safe_NE / safe_NE.norm(dim=1, keepdim=True)
    return torch.where(length_N1 > LENGTH_EPS, unit_NE, torch.zeros_like(unit_NE))


def similarity(clean_NE: Tensor, perturbed_ME: Tensor) -> Tensor:
    """Cosine similarities ``[N, M]`` of two sets of embeddings (which have length 1), in at least fp32."""
    _checks.dims("clean_NE", clean_NE, 2)
    _checks.dims("perturbed_ME", perturbed_ME, 2)
    # Divided by a temperature of 0.3, an error of bf16 would be one of several percent.
    with _full_precision(clean_NE):
        return at_least_fp32(clean_NE) @ at_least_fp32(perturbed_ME).T


def contrast(
    similarity_NN: Tensor, temperature: float, denominator: str = "others", mask_N: Tensor | None = None
) -> Tensor:
    """``-log(exp(s_ii / tau) / sum_j exp(s_ij / tau))`` for every image i of the global batch, ``[N]`` (Eqs. 15, 16).

    Args:
        similarity_NN: of each image's clean version (rows) with every image's perturbed version (columns).
        temperature: tau.
        denominator: ``"others"`` sums over j other than i, without the positive, as printed (the value can be
            negative); ``"all"`` includes it, the usual InfoNCE.
        mask_N: true where there is an image. A masked image is neither anchor nor contrast.

    Returns:
        0 for a masked image, and for one with nothing to be told from.

    Raises:
        ValueError: not a square matrix, an unknown ``denominator``, or a temperature that is not above 0.
    """
    _checks.one_of("denominator", denominator, DENOMINATORS)
    _checks.positive_temperature(temperature)
    _checks.dims("similarity_NN", similarity_NN, 2)
    _checks.same_shape("similarity_NN", similarity_NN, "its transpose", similarity_NN.T)
    scores_NN = at_least_fp32(similarity_NN) / temperature
    count = len(scores_NN)
    own_NN = torch.eye(count, dtype=torch.bool, device=scores_NN.device)
    valid_N = own_NN.new_ones(count) if mask_N is None else mask_N.bool()
    counted_NN = valid_N.unsqueeze(0) & (~own_NN if denominator == "others" else torch.ones_like(own_NN))
    # A finite floor: a row of minus infinity would make the logarithm's gradient NaN.
    floor = torch.finfo(scores_NN.dtype).min / 2
    log_sum_N = torch.logsumexp(torch.where(counted_NN, scores_NN, floor), dim=1)
    loss_N = log_sum_N - scores_NN.diagonal()
    return torch.where(valid_N & counted_NN.any(dim=1), loss_N, torch.zeros_like(loss_N))


def _full_precision(like: Tensor) -> AbstractContextManager[object]:
    if like.is_meta:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
