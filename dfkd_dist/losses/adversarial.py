"""What a generator *minimises* so that a teacher and another network disagree on its images.

Each term is minus a discrepancy. Both arguments receive gradient, because both depend on the images; the
caller decides which weights are frozen.
"""

from torch import Tensor

from dfkd_dist.losses import _checks, distillation
from dfkd_dist.losses._numerics import kl_of_log_probs, log_probs


def kl(target_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float) -> Tensor:
    """``-KL(softmax(t / tau) || softmax(a / tau))`` per sample, ``[N]``, at most 0 (DFMF, Eq. 5)."""
    _checks.same_shape("target_logits_NC", target_logits_NC, "other_logits_NC", other_logits_NC)
    log_p_NC = log_probs("target_logits_NC", target_logits_NC, temperature)
    return -kl_of_log_probs(log_p_NC, log_probs("other_logits_NC", other_logits_NC, temperature))


def l1(target_logits_NC: Tensor, other_logits_NC: Tensor) -> Tensor:
    """Minus the mean absolute difference of logits per sample, ``[N]`` (DFAD, classification)."""
    return -distillation.l1(target_logits_NC, other_logits_NC)


def log_l1(target_logits: Tensor, other_logits: Tensor) -> Tensor:
    """``-log(L1 + 1)`` per sample, ``[N]`` (DFAD, segmentation); dense logits ``[N, C, H, W]`` or ``[N, C]``.

    The logarithm is of each sample's own L1, so the term stays a sum over samples.
    """
    return -distillation.l1(target_logits, other_logits).log1p()


def masked_kl(target_logits_NC: Tensor, other_logits_NC: Tensor, temperature: float) -> Tensor:
    """:func:`kl` where both networks choose the same class, 0 elsewhere, ``[N]`` (CMI, decision-adversarial).

    Images on which the two already differ are left alone; the choice has no gradient.
    """
    negative_kl_N = kl(target_logits_NC, other_logits_NC, temperature)
    agree_N = target_logits_NC.detach().argmax(dim=1) == other_logits_NC.detach().argmax(dim=1)
    return negative_kl_N * agree_N.to(negative_kl_N.dtype)
