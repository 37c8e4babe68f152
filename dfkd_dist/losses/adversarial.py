"""What a generator *minimises* so that a teacher and another network disagree on its images or on their pixels.

Each term is minus a discrepancy. Both arguments receive gradient, because both depend on the images; the
caller decides which weights are frozen.
"""

from torch import Tensor

from dfkd_dist.losses import _checks, distillation
from dfkd_dist.losses._numerics import kl_of_log_probs, log_probs, over_positions


def kl(target_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float) -> Tensor:
    """``-KL(softmax(t / tau) || softmax(a / tau))`` per sample, ``[N]``, at most 0 (DFMF, Eq. 5)."""
    return -over_positions(_kl(target_logits_NC, other_logits_NC, temperature))


def l1(target_logits_NC: Tensor, other_logits_NC: Tensor) -> Tensor:
    """Minus the mean absolute difference of logits per sample, ``[N]`` (DFAD, classification)."""
    return -distillation.l1(target_logits_NC, other_logits_NC)


def log_l1(mean_l1: Tensor) -> Tensor:
    """``-log(L1 + 1)``, a scalar (DFAD, segmentation).

    L1 is DFAD's expectation over images: the mean of :func:`distillation.l1` over the *global* batch. The logarithm is
    of that mean (as in its released code), not of each image's own L1, which would count images on which the two
    differ much for less than the others.
    """
    _checks.dims("mean_l1", mean_l1, 0)
    return -mean_l1.log1p()


def masked_kl(target_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float) -> Tensor:
    """:func:`kl` where both networks choose the same class, 0 elsewhere, ``[N]`` (CMI, decision-adversarial).

    Images (or pixels) on which the two already differ are left alone; the choice has no gradient.
    """
    kl_N = _kl(target_logits_NC, other_logits_NC, temperature)
    agree_N = target_logits_NC.detach().argmax(dim=1) == other_logits_NC.detach().argmax(dim=1)
    return -over_positions(kl_N * agree_N.to(kl_N.dtype))


def _kl(target_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float) -> Tensor:
    """``[N, *positions]``."""
    _checks.same_shape("target_logits_NC", target_logits_NC, "other_logits_NC", other_logits_NC)
    log_p_NC = log_probs("target_logits_NC", target_logits_NC, temperature)
    return kl_of_log_probs(log_p_NC, log_probs("other_logits_NC", other_logits_NC, temperature))
