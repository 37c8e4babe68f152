"""Numerics shared by the loss modules: working precision, logarithms and divergences that stay finite."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks

SHORTEST = 1e-8
"""Length up to which a vector counts as zero, where its direction is wanted."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in the precision that losses compute in: half precisions become fp32, fp32 and fp64 stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Products of matrices in the precision of their operands, whatever autocast is in force around."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def directions(vectors_ND: Tensor, shortest: float = SHORTEST) -> Tensor:
    """Vectors scaled to length 1 over the last dimension, in at least fp32.

    One that is not longer than ``shortest`` has no direction: zeros, and no gradient.
    """
    vectors_ND = at_least_fp32(vectors_ND)
    length_N1 = vectors_ND.norm(dim=-1, keepdim=True)
    long_N1 = length_N1 > shortest
    return torch.where(long_N1, vectors_ND / torch.where(long_N1, length_N1, 1.0), 0.0)


def safe_log(probs: Tensor) -> Tensor:
    """``log(p)``, p at least the smallest normal number: value and gradient are finite at ``p = 0``."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def log_probs(key: str, logits_NC: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` over classes, shaped as the logits, in at least fp32."""
    _checks.class_scores(key, logits_NC)
    _checks.positive_temperature(temperature)
    return F.log_softmax(at_least_fp32(logits_NC) / temperature, dim=1)


def over_positions(values: Tensor) -> Tensor:
    """``[N]`` as it is, ``[N, *positions]`` as its mean over positions, ``[N]``: a sample weighs one, of any size."""
    return values if values.dim() == 1 else values.flatten(1).mean(dim=1)


def entropy_of_probs(probs: Tensor, dim: int = -1) -> Tensor:
    """``-sum p log p`` over the dimension of the classes, in nats; a zero probability contributes zero."""
    probs = at_least_fp32(probs)
    return -(probs * safe_log(probs)).sum(dim=dim)


def kl_of_log_probs(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """``KL(p || q)`` over classes from two log-softmax outputs, in nats; both sides receive gradient.

    ``[N, C, *positions]`` gives ``[N, *positions]``. Log-softmax of finite logits is finite, so ``p log p`` needs no
    clamp here and its gradient is exact.
    """
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=1)
