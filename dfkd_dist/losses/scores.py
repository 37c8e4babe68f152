"""How sure one teacher or several are of each image, as numbers by which a large set is put in order.

Half precision and plain softmax probabilities tie: a well trained network gives many images a probability that rounds
to exactly 1. So confidence is expressed by its distance to certainty, which fp32 resolves down to 1e-38. Everything is
computed in float64 and rounded to fp32 once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks

_WEIGHT_SUM_TOLERANCE = 1e-6


class Scores(NamedTuple):
    """What a choice among images is made by; all of the weighted mean of the teachers' probabilities."""

    confidence_N: Tensor
    """fp32, -log of the largest probability: 0 is certainty, log C is none. *Smaller is more confident.*"""
    entropy_N: Tensor
    """fp32, in nats, between 0 and log C."""
    labels_N: Tensor
    """int64, the likeliest class; of equal ones the lowest."""


def scores(logits_list: Sequence[Tensor], weights: Sequence[float]) -> Scores:
    """Confidence, entropy and pseudo-label of each image.

    For one teacher the confidence is `log1p(sum over the others of exp(z_j - z_max))`; for several it is the same
    function of p = sum_k w_k softmax(z_k), `log1p(sum over the others of p_j / p_max)`, where the sum is made of the
    small terms themselves and never as 1 - p_max. Two images tie only where fp32 cannot tell their scores apart, or
    where the winner leads by more than about 87 nats (the score is then 0); which of them goes first is up to the
    caller.

    Args:
        logits_list: `[N, C]` of each teacher, classes in one order.
        weights: w_k, summing to 1.

    Raises:
        ValueError: no teachers, other shapes, or weights that are not as many shares of 1.
    """
    probs_NC, labels_N = mean_probs(logits_list, weights)
    best_N1 = probs_NC.gather(1, labels_N[:, None])
    others_NC = probs_NC.scatter(1, labels_N[:, None], 0.0)
    confidence_N = torch.log1p(others_NC.sum(dim=1) / best_N1[:, 0])
    # -p_max log p_max from the confidence, which is exact where p_max rounds to 1.
    entropy_N = best_N1[:, 0] * confidence_N - torch.xlogy(others_NC, others_NC).sum(dim=1)
    return Scores(confidence_N.float(), entropy_N.clamp_min(0.0).float(), labels_N)


def mean_probs(logits_list: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weighted mean of the teachers' probabilities, float64 `[N, C]`, and its argmax, int64 `[N]`.

    Raises:
        ValueError: as `scores`.
    """
    if not logits_list or len(logits_list) != len(weights):
        raise ValueError(f"weights: expected one for each of {len(logits_list)} teachers (at least one), got {weights}")
    if min(weights) < 0 or abs(sum(weights) - 1.0) > _WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"weights: expected shares of 1, found {list(weights)}")
    total_NC: Tensor | None = None
    for logits_NC, weight in zip(logits_list, weights, strict=True):
        _checks.dims("logits_list", logits_NC, 2)
        _checks.same_shape("logits_list", logits_NC, "logits_list", logits_list[0])
        part_NC = weight * F.softmax(logits_NC.double(), dim=1)
        total_NC = part_NC if total_NC is None else total_NC + part_NC
    assert total_NC is not None
    return total_NC, total_NC.argmax(dim=1)


def surest(logits_list: Sequence[Tensor]) -> Tensor:
    """int64 `[N]`: which teacher gives its own favourite the largest probability; of equal ones the first."""
    even = [scores([logits_NC], [1.0]).confidence_N for logits_NC in logits_list]
    return torch.stack(even).argmin(dim=0)
