"""KD3's choice of useful images: the equations of its section 3.2 as functions of probabilities.

"Distribution Shift Matters for Knowledge Distillation with Webly Collected Images" (Tang et al. 2023), Eqs. 3 to
8. Who scores the images, and how counts of several ranks are added, is the caller's business: class counts are
integers, so their sum does not depend on who counted.
"""

import math

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32

COUNTS = ("all", "confident")


def alpha(epoch: float, epochs: float) -> float:
    """The student's share of the combined prediction in epoch ``t = epoch`` of ``I = epochs`` (Eq. 4).

    ``exp(-5 (t / (I/2) - 1)^2)`` up to half of the epochs, 1 after it. Epochs count from 0, so it begins at
    exp(-5), about 0.007. This is not the alpha of Eq. 18, which weighs a loss.

    Raises:
        ValueError: a negative epoch, or no epochs.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"epochs: expected a finite number > 0, found {epochs!r}")
    if not (math.isfinite(epoch) and epoch >= 0):
        raise ValueError(f"epoch: expected a finite number >= 0, found {epoch!r}")
    half = epochs / 2
    return math.exp(-5.0 * (epoch / half - 1.0) ** 2) if epoch <= half else 1.0


def combine(teacher_probs_NC: Tensor, student_probs_NC: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) N_T(x) + alpha N_S(x)``, ``[N, C]`` probabilities in at least fp32 (Eq. 3).

    Raises:
        ValueError: unequal shapes, or an alpha outside 0 to 1.
    """
    _checks.dims("teacher_probs_NC", teacher_probs_NC, 2)
    _checks.same_shape("teacher_probs_NC", teacher_probs_NC, "student_probs_NC", student_probs_NC)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number from 0 to 1, found {alpha!r}")
    return (1.0 - alpha) * at_least_fp32(teacher_probs_NC) + alpha * at_least_fp32(student_probs_NC)


def predict(probs_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class ``y_i``, int64 ``[N]``, and its probability ``p_i``, ``[N]`` (Eq. 5).

    Among equal probabilities the lowest class is taken.
    """
    _checks.dims("probs_NC", probs_NC, 2)
    confidence_N, labels_N = at_least_fp32(probs_NC).max(dim=1)
    return labels_N, confidence_N


def class_counts(labels_N: Tensor, confidence_N: Tensor, num_classes: int, counts: str, threshold: float) -> Tensor:
    """``n_c``: how many images are predicted to be of class c, int64 ``[C]`` (before Eq. 6).

    Args:
        labels_N: predicted classes; those of some images may be counted here and the others elsewhere.
        confidence_N: their probabilities.
        num_classes: C.
        counts: ``"all"`` predicted labels, as printed; or ``"confident"`` ones alone, ``p_i > V_th``, as the
            paper's text implies.
        threshold: V_th; used by ``"confident"``.

    Raises:
        ValueError: unequal shapes or an unknown ``counts``.
    """
    _checks.one_of("counts", counts, COUNTS)
    _checks.dims("labels_N", labels_N, 1)
    _checks.same_shape("labels_N", labels_N, "confidence_N", confidence_N)
    ones_N = torch.ones_like(labels_N) if counts == "all" else (confidence_N.double() > threshold).long()
    return labels_N.new_zeros(num_classes).index_add_(0, labels_N, ones_N)


def thresholds(counts_C: Tensor, threshold: float) -> Tensor:
    """``T_c = n_c / max_j n_j * V_th``, float64 ``[C]`` (Eqs. 6 and 7).

    A class that nobody is predicted to be of has threshold 0, which no image ever meets. Where no image was
    counted at all, every threshold is 0.
    """
    _checks.dims("counts_C", counts_C, 1)
    counts_C = counts_C.double()
    return counts_C / counts_C.max().clamp_min(1.0) * threshold


def select(labels_N: Tensor, confidence_N: Tensor, thresholds_C: Tensor) -> Tensor:
    """Which images are kept: ``p_i > T_{y_i}``, bool ``[N]`` (Eq. 8). Compared in float64."""
    _checks.same_shape("labels_N", labels_N, "confidence_N", confidence_N)
    _checks.dims("thresholds_C", thresholds_C, 1)
    return confidence_N.double() > thresholds_C.double()[labels_N]
