"""What a student or an assistant minimises to imitate teachers, and how several teachers make one target."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import (
    at_least_fp32,
    entropy_of_probs,
    kl_of_log_probs,
    log_probs,
    over_positions,
    safe_log,
)

IGNORE = 255
"""The label of a pixel that belongs to no class. Only maps of labels have it: an image's own class may well be 255."""

_WEIGHT_SUM_TOLERANCE = 1e-6
_MAP_SCALE_FLOOR = 1e-6


def tempered_mean(logits_list: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """The ensemble's soft target ``sum_k w_k softmax(t_k / tau)`` (DFMF, Eq. 1): a mean of probabilities.

    Args:
        logits_list: K tensors ``[N, C]`` or ``[N, C, *positions]``, one per teacher, classes in one order.
        weights: K non-negative floats that sum to 1.
        temperature: tau, above 0.

    Returns:
        Probabilities of that shape in at least fp32.

    Raises:
        ValueError: no teachers, unequal shapes, or weights that are not K shares of 1.
    """
    _check_teachers(logits_list, weights)
    probs = [log_probs("logits_list", logits, temperature).exp() for logits in logits_list]
    return _weighted_sum(probs, weights)


def mean_logits(logits_list: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k t_k``, logits of the same shape: the ensemble of DFAD-style and federated methods.

    Arguments and errors as in :func:`tempered_mean`.
    """
    _check_teachers(logits_list, weights)
    return _weighted_sum([at_least_fp32(logits) for logits in logits_list], weights)


def lowest_entropy_choice(probs_KNC: Tensor) -> Tensor:
    """Each sample's answer from the teacher with the lowest entropy, ``[N, C]`` (HighestConf, as in DEKAN).

    ``[K, N, C, *positions]`` is answered position by position. Ties go to the first teacher.
    """
    if probs_KNC.dim() < 3:
        raise ValueError(f"probs_KNC: expected [K, N, C] or [K, N, C, *positions], found {tuple(probs_KNC.shape)}")
    choice_N = entropy_of_probs(probs_KNC, dim=2).argmin(dim=0)
    index_1NC = choice_N.unsqueeze(1).expand_as(probs_KNC[0]).unsqueeze(0)
    return probs_KNC.gather(0, index_1NC).squeeze(0)


def kl(target_probs_NC: Tensor, logits_NC: Tensor, temperature: float) -> Tensor:
    """``KL(p || softmax(s / tau))`` per sample, in nats (DFMF, Eqs. 1 and 2).

    Only the logits are tempered: the target comes from :func:`tempered_mean` at the same temperature. No
    factor tau^2 is applied; a recipe that wants it puts it in the weight.

    Returns:
        ``[N]``, of ``[N, C, *positions]`` the mean over positions; 0 where the two distributions are equal.
    """
    _checks.same_shape("target_probs_NC", target_probs_NC, "logits_NC", logits_NC)
    log_q_NC = log_probs("logits_NC", logits_NC, temperature)
    target_NC = at_least_fp32(target_probs_NC)
    return over_positions((target_NC * (safe_log(target_NC) - log_q_NC)).sum(dim=1))


def reverse_kl(target_probs_NC: Tensor, logits_NC: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(s / tau) || p)`` per sample, in nats: the order that DEKAN prints in its Eq. 3.

    A target probability of 0 counts as the smallest normal number of the working precision, so that the
    divergence from a one-hot target is large and finite.

    Returns:
        ``[N]``, of ``[N, C, *positions]`` the mean over positions.
    """
    _checks.same_shape("target_probs_NC", target_probs_NC, "logits_NC", logits_NC)
    log_q_NC = log_probs("logits_NC", logits_NC, temperature)
    return over_positions(kl_of_log_probs(log_q_NC, safe_log(at_least_fp32(target_probs_NC))))


def l1(teacher_logits_NC: Tensor, logits_NC: Tensor) -> Tensor:
    """Mean absolute difference of logits per sample, ``[N]`` (DFAD's model discrepancy).

    The mean is over all dimensions but the first, so dense predictions ``[N, C, H, W]`` work too.
    """
    _checks.same_shape("teacher_logits_NC", teacher_logits_NC, "logits_NC", logits_NC)
    difference = at_least_fp32(teacher_logits_NC) - at_least_fp32(logits_NC)
    return difference.abs().flatten(1).mean(dim=1)


def cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` per sample, ``[N]``.

    Labels ``[N]`` must be in ``0 .. C-1``, in masked slots too: there is none that means "ignore". In maps of labels
    ``[N, *positions]`` beside logits ``[N, C, *positions]``, :data:`IGNORE` does: a sample's value is the mean over its
    valid positions, and 0 where it has none (it is still counted). So the batch's mean is one of samples, not of
    pixels, and does not depend on how the samples are dealt.

    Raises:
        ValueError: shapes do not fit, or a map of labels for more than 255 classes.
    """
    log_p_NC = log_probs("logits_NC", logits_NC)
    if labels_N.shape != log_p_NC.shape[:1] + log_p_NC.shape[2:]:
        found = f"{tuple(labels_N.shape)} and {tuple(logits_NC.shape)}"
        raise ValueError(f"labels_N and logits_NC: expected [N, *positions] and [N, C, *positions], found {found}")
    if labels_N.dim() == 1:
        return -log_p_NC.gather(1, labels_N.long().unsqueeze(1)).squeeze(1)
    if logits_NC.shape[1] > IGNORE:
        raise ValueError(f"logits_NC: maps of labels take at most {IGNORE} classes, found {logits_NC.shape[1]}")
    valid = labels_N != IGNORE
    chosen = torch.where(valid, labels_N, 0).long()
    values = torch.where(valid, -log_p_NC.gather(1, chosen.unsqueeze(1)).squeeze(1), 0.0)
    return values.flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp_min(1)


def attention_map(map_NDHW: Tensor, size_HW: tuple[int, int] | None = None) -> Tensor:
    """Spatial attention ``[N, H*W]``: the channel mean of squares, scaled to L2 norm 1 (ZSKT).

    With ``size_HW`` the map of mean squares is pooled to that size before it is normalised. An all-zero map
    gives zeros.
    """
    _checks.dims("map_NDHW", map_NDHW, 4)
    activations = at_least_fp32(map_NDHW)
    # The result does not depend on the scale of a sample's map, so dividing by a constant first changes
    # neither value nor gradient, and squares of large or small activations can neither overflow nor vanish.
    scale = activations.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(_MAP_SCALE_FLOOR)
    attention_NHW = (activations / scale).square().mean(dim=1)
    if size_HW is not None and tuple(attention_NHW.shape[1:]) != size_HW:
        attention_NHW = F.adaptive_avg_pool2d(attention_NHW, size_HW)
    return F.normalize(attention_NHW.flatten(1), dim=1)


def attention_transfer(student_map_NDHW: Tensor, teacher_map_NDHW: Tensor) -> Tensor:
    """Mean over positions of the squared difference of two attention maps, ``[N]`` (ZSKT; one layer pair).

    Channel counts may differ; maps of unequal size are pooled to the smaller height and width.
    """
    _checks.dims("student_map_NDHW", student_map_NDHW, 4)
    _checks.dims("teacher_map_NDHW", teacher_map_NDHW, 4)
    height = min(student_map_NDHW.shape[2], teacher_map_NDHW.shape[2])
    width = min(student_map_NDHW.shape[3], teacher_map_NDHW.shape[3])
    student = attention_map(student_map_NDHW, (height, width))
    teacher = attention_map(teacher_map_NDHW, (height, width))
    _checks.same_shape("student_map_NDHW", student, "teacher_map_NDHW", teacher)
    return (student - teacher).square().mean(dim=1)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(dim=0)


def _check_teachers(logits_list: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not logits_list:
        raise ValueError("logits_list: expected at least one teacher, found none")
    if len(weights) != len(logits_list):
        raise ValueError(f"weights: expected {len(logits_list)} (one per teacher), found {len(weights)}")
    if any(not math.isfinite(w) or w < 0 for w in weights) or abs(sum(weights) - 1) > _WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"weights: expected non-negative numbers that sum to 1, found {list(weights)}")
    for index, logits in enumerate(logits_list):
        _checks.class_scores(f"logits_list[{index}]", logits)
        _checks.same_shape("logits_list[0]", logits_list[0], f"logits_list[{index}]", logits)
