"""What a student or an assistant minimises to imitate teachers, and how several teachers make one target."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, entropy_of_probs, kl_of_log_probs, log_probs, safe_log

_WEIGHT_SUM_TOLERANCE = 1e-6
_MAP_SCALE_FLOOR = 1e-6


def tempered_mean(logits_list: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """The ensemble's soft target ``sum_k w_k softmax(t_k / tau)`` (DFMF, Eq. 1): a mean of probabilities.

    Args:
        logits_list: K tensors ``[N, C]``, one per teacher, classes in one order.
        weights: K non-negative floats that sum to 1.
        temperature: tau, above 0.

    Returns:
        Probabilities ``[N, C]`` in at least fp32.

    Raises:
        ValueError: no teachers, unequal shapes, or weights that are not K shares of 1.
    """
    _check_teachers(logits_list, weights)
    probs = [log_probs("logits_list", logits, temperature).exp() for logits in logits_list]
    return _weighted_sum(probs, weights)


def mean_logits(logits_list: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k t_k`` as ``[N, C]`` logits: the ensemble of DFAD-style and federated methods.

    Arguments and errors as in :func:`tempered_mean`.
    """
    _check_teachers(logits_list, weights)
    return _weighted_sum([at_least_fp32(logits) for logits in logits_list], weights)


def lowest_entropy_choice(probs_KNC: Tensor) -> Tensor:
    """Each sample's answer from the teacher with the lowest entropy, ``[N, C]`` (HighestConf, as in DEKAN).

    Ties go to the first teacher.
    """
    _checks.dims("probs_KNC", probs_KNC, 3)
    choice_N = entropy_of_probs(probs_KNC).argmin(dim=0)
    index_1NC = choice_N.view(1, -1, 1).expand(1, -1, probs_KNC.shape[2])
    return probs_KNC.gather(0, index_1NC).squeeze(0)


def kl(target_probs_NC: Tensor, logits_NC: Tensor, temperature: float) -> Tensor:
    """``KL(p || softmax(s / tau))`` per sample, in nats (DFMF, Eqs. 1 and 2).

    Only the logits are tempered: the target comes from :func:`tempered_mean` at the same temperature. No
    factor tau^2 is applied; a recipe that wants it puts it in the weight.

    Returns:
        ``[N]``; 0 where the two distributions are equal.
    """
    _checks.same_shape("target_probs_NC", target_probs_NC, "logits_NC", logits_NC)
    log_q_NC = log_probs("logits_NC", logits_NC, temperature)
    target_NC = at_least_fp32(target_probs_NC)
    return (target_NC * (safe_log(target_NC) - log_q_NC)).sum(dim=1)


def reverse_kl(target_probs_NC: Tensor, logits_NC: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(s / tau) || p)`` per sample, in nats: the order that DEKAN prints in its Eq. 3.

    A target probability of 0 counts as the smallest normal number of the working precision, so that the
    divergence from a one-hot target is large and finite.

    Returns:
        ``[N]``.
    """
    _checks.same_shape("target_probs_NC", target_probs_NC, "logits_NC", logits_NC)
    log_q_NC = log_probs("logits_NC", logits_NC, temperature)
    return kl_of_log_probs(log_q_NC, safe_log(at_least_fp32(target_probs_NC)))


def l1(teacher_logits_NC: Tensor, logits_NC: Tensor) -> Tensor:
    """Mean absolute difference of logits per sample, ``[N]`` (DFAD's model discrepancy).

    The mean is over all dimensions but the first, so dense predictions ``[N, C, H, W]`` work too.
    """
    _checks.same_shape("teacher_logits_NC", teacher_logits_NC, "logits_NC", logits_NC)
    difference = at_least_fp32(teacher_logits_NC) - at_least_fp32(logits_NC)
    return difference.abs().flatten(1).mean(dim=1)


def cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` per sample, ``[N]``.

    Every label must be in ``0 .. C-1``, in masked slots too: there is no label that means "ignore".
    """
    return -log_probs("logits_NC", logits_NC).gather(1, labels_N.long().unsqueeze(1)).squeeze(1)


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
        _checks.dims(f"logits_list[{index}]", logits, 2)
        _checks.same_shape("logits_list[0]", logits_list[0], f"logits_list[{index}]", logits)
