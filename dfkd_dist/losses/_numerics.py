"""Numerics shared by the loss modules: working precision, logarithms and divergences that stay finite."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in the precision that losses compute in: half precisions become fp32, fp32 and fp64 stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def safe_log(probs: Tensor) -> Tensor:
    """``log(p)``, p at least the smallest normal number: value and gradient are finite at ``p = 0``."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def log_probs(key: str, logits_NC: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` as ``[N, C]`` in at least fp32."""
    _checks.dims(key, logits_NC, 2)
    _checks.positive_temperature(temperature)
    return F.log_softmax(at_least_fp32(logits_NC) / temperature, dim=1)


def entropy_of_probs(probs: Tensor) -> Tensor:
    """``-sum p log p`` over the last dimension, in nats; a zero probability contributes zero."""
    probs = at_least_fp32(probs)
    return -(probs * safe_log(probs)).sum(dim=-1)


def kl_of_log_probs(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """``KL(p || q)`` per sample from two log-softmax outputs, in nats; both sides receive gradient.

    Log-softmax of finite logits is finite, so ``p log p`` needs no clamp here and its gradient is exact.
    """
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=1)
