"""Contrastive representation distillation (Tian et al. 2020): noise-contrastive estimation against a memory.

Each network has an embedding of length 1 and a memory with a row for every sample. One network's embedding of an
image is to be told by the other's memory: its own row from ``K`` rows of other samples. The two memories and both
embeddings are learnable or move, and live with the student; here are only the functions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, directions, full_precision


def embedding(projected_NE: Tensor) -> Tensor:
    """Vectors of length 1, ``[N, E]`` in at least fp32: what follows the linear layer of either network."""
    _checks.dims("projected_NE", projected_NE, 2)
    return directions(projected_NE)


def similarities(embedded_NE: Tensor, memory_ME: Tensor, rows_NK: Tensor) -> Tensor:
    """Inner products of each embedding with its own choice of a memory's rows, ``[N, K]``, in at least fp32.

    The memory gets no gradient, and may change before the backward pass. Of the two ways (all products, then a
    choice; or a choice of rows, then products) the one that needs less memory is taken.

    Raises:
        ValueError: not matrices, or another number of embeddings than of choices.
    """
    for name, tensor in (("embedded_NE", embedded_NE), ("memory_ME", memory_ME), ("rows_NK", rows_NK)):
        _checks.dims(name, tensor, 2)
    _checks.same_shape("embedded_NE's rows", embedded_NE[:, 0], "rows_NK's rows", rows_NK[:, 0])
    (samples, width), (count, choices) = memory_ME.shape, rows_NK.shape
    embedded_NE, memory_ME = at_least_fp32(embedded_NE), at_least_fp32(memory_ME.detach())
    with full_precision(embedded_NE):
        if samples * (width + count) <= count * choices * width:
            return (embedded_NE @ memory_ME.clone().T).gather(1, rows_NK)
        return torch.bmm(memory_ME[rows_NK], embedded_NE.unsqueeze(2)).squeeze(2)


def normaliser_parts(similarities_NK: Tensor, temperature: float, samples: int) -> Tensor:
    """A rank's part of what log Z is made from: ``samples * sum exp(s / tau)``, and how many s there are, ``[2]``.

    Summed over ranks, Z is the first divided by the second. It estimates the sum over the whole memory; the released
    code takes it from the first batch and keeps it. Float64, so that a low temperature does not overflow.
    """
    _checks.positive_temperature(temperature)
    total = (similarities_NK.detach().double() / temperature).exp().sum()
    return torch.stack([total * samples, torch.full_like(total, similarities_NK.numel())])


def nce(similarities_NK: Tensor, log_z: Tensor | float, temperature: float, samples: int) -> Tensor:
    """``-log h(positive) - sum over negatives log(1 - h)`` per image, ``[N]`` (CRD, section 3).

    ``h = P / (P + K / M)`` with ``P = exp(s / tau) / Z``, K negatives and M samples. Computed from logarithms, so
    that neither a tiny h nor a tiny 1 - h is lost (the released code adds 1e-7 instead).

    Args:
        similarities_NK: column 0 is the positive, the K others the negatives.
        log_z: logarithm of Z, without gradient.
        temperature: tau.
        samples: M.

    Raises:
        ValueError: no column for the positive, or no negatives.
    """
    _checks.dims("similarities_NK", similarities_NK, 2)
    _checks.positive_temperature(temperature)
    negatives = similarities_NK.shape[1] - 1
    if negatives < 1:
        raise ValueError(f"similarities_NK: expected a positive and a negative at least, found {negatives + 1} columns")
    log_odds_NK = at_least_fp32(similarities_NK) / temperature - log_z - math.log(negatives / samples)
    return -F.logsigmoid(log_odds_NK[:, 0]) - F.logsigmoid(-log_odds_NK[:, 1:]).sum(dim=1)


def moved(rows_NE: Tensor, embedded_NE: Tensor, momentum: float) -> Tensor:
    """Memory rows after their images were seen: ``momentum * row + (1 - momentum) * embedding``, of length 1."""
    _checks.same_shape("rows_NE", rows_NE, "embedded_NE", embedded_NE)
    mixed_NE = momentum * rows_NE + (1.0 - momentum) * embedded_NE.detach().to(rows_NE.dtype)
    return directions(mixed_NE).to(rows_NE.dtype)
