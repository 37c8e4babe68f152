"""Noisy distillation (DFND; Chen et al. 2021, "Learning Student Networks in the Wild").

The teacher's guesses on images of another domain are labels with noise. The noise is a matrix Q over classes, whose
off-diagonals are learned with the student: Q_ij is the probability that the teacher guesses j where the truth is i.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, log_probs


def log_transition(noise_logits_CB: Tensor, accuracy: float) -> Tensor:
    """``log Q``, ``[C, C]``; rows sum to 1.

    The diagonal is the teacher's accuracy a, and a row's other entries are ``(1 - a)`` times a softmax.

    Args:
        noise_logits_CB: ``[C, C - 1]``: for each true class, logits of the other classes in order.
        accuracy: a, between 0 and 1.

    Raises:
        ValueError: not ``[C, C - 1]`` with C at least 2, or an accuracy that is not between 0 and 1.
    """
    _checks.dims("noise_logits_CB", noise_logits_CB, 2)
    classes, others = noise_logits_CB.shape
    if classes < 2 or others != classes - 1:
        raise ValueError(f"noise_logits_CB: expected shape (C, C - 1), found {tuple(noise_logits_CB.shape)}")
    if not 0.0 < accuracy < 1.0:
        raise ValueError(f"accuracy: expected a number between 0 and 1 (both excluded), found {accuracy!r}")
    log_off_CB = math.log1p(-accuracy) + torch.log_softmax(at_least_fp32(noise_logits_CB), dim=1)
    # Row by row, the entries between two neighbours on the diagonal are C in number.
    between = F.pad(log_off_CB.reshape(others, classes), (0, 1), value=math.log(accuracy))
    diagonal = log_off_CB.new_full((1,), math.log(accuracy))
    return torch.cat([diagonal, between.flatten()]).view(classes, classes)


def noisy_cross_entropy(logits_NC: Tensor, guesses_N: Tensor, log_transition_CC: Tensor) -> Tensor:
    """``-log sum_i softmax(s)_i Q_{i, guess}`` per sample, ``[N]`` (H_CE(Q(N_S(x)), y) of DFND).

    Args:
        logits_NC: of the student.
        guesses_N: the teacher's classes.
        log_transition_CC: from :func:`log_transition`.

    Raises:
        ValueError: shapes do not fit.
    """
    log_p_NC = log_probs("logits_NC", logits_NC)
    _checks.dims("guesses_N", guesses_N, 1)
    classes = log_p_NC.shape[1]
    if log_transition_CC.shape != (classes, classes):
        found = tuple(log_transition_CC.shape)
        raise ValueError(f"log_transition_CC: expected shape {(classes, classes)} (logits_NC's classes), found {found}")
    return -torch.logsumexp(log_p_NC + log_transition_CC.T[guesses_N], dim=1)
