"""Adaptive competition: images on which a teacher and the student say different things (Adaptive DeepInversion)."""

import math

from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import kl_of_log_probs, log_probs

DIVERGENCES = ("released", "jensen_shannon")
LOWEST, HIGHEST = 0.01, 0.99
"""Between which the released code clamps probabilities."""


def divergence(teacher_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float, form: str) -> Tensor:
    """How much two networks differ about each image, ``[N]``, at least 0; both receive gradient.

    With P and Q their probabilities at the temperature and M = (P + Q) / 2, ``jensen_shannon`` is
    ``(KL(P || M) + KL(Q || M)) / 2``, between 0 and log 2. ``released`` is what DeepInversion's code computes in its
    place: ``(KL(M || P) + KL(M || Q)) / 2`` with P, Q and M clamped to [0.01, 0.99]. What is clamped has no gradient.

    Raises:
        ValueError: unequal shapes, a temperature that is not above 0, or an unknown form.
    """
    _checks.one_of("form", form, DIVERGENCES)
    _checks.same_shape("teacher_logits_NC", teacher_logits_NC, "other_logits_NC", other_logits_NC)
    log_p_NC = log_probs("other_logits_NC", other_logits_NC, temperature)
    log_q_NC = log_probs("teacher_logits_NC", teacher_logits_NC, temperature)
    if form == "jensen_shannon":
        log_m_NC = log_p_NC.logaddexp(log_q_NC) - math.log(2.0)
        return 0.5 * (kl_of_log_probs(log_p_NC, log_m_NC) + kl_of_log_probs(log_q_NC, log_m_NC))
    p_NC, q_NC = log_p_NC.exp(), log_q_NC.exp()
    m_NC = (0.5 * (p_NC + q_NC)).clamp(LOWEST, HIGHEST)
    gaps = [m_NC.log() - probs_NC.clamp(LOWEST, HIGHEST).log() for probs_NC in (p_NC, q_NC)]
    return 0.5 * (m_NC * (gaps[0] + gaps[1])).sum(dim=1)


def competition(mean_divergence: Tensor) -> Tensor:
    """``1 - clamp(JS, 0, 1)``, a scalar that images minimise (DeepInversion, R_compete).

    ``mean_divergence`` is the mean over the *global* batch; beyond the bounds there is no gradient.
    """
    _checks.dims("mean_divergence", mean_divergence, 0)
    return 1.0 - mean_divergence.clamp(0.0, 1.0)
