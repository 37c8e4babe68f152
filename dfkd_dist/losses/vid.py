"""Variational information distillation (Ahn et al. 2019): a Gaussian guess of the teacher's features.

The regressor that guesses the mean and the parameter behind the variance are learnable and live with the
student; here are only the functions.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32

VARIANCE_EPS = 1e-5


def vid(predicted_NDHW: Tensor, target_NDHW: Tensor, variance_D: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's features, without its constant (VID, Eqs. 4 and 5).

    The mean over D, H and W of ``0.5 * (log var + (t - mu)^2 / var)``, ``[N]``. The paper writes a sum over
    positions; a mean keeps one weight usable for maps of every size. The value can be negative. Vectors ``[N,
    D]`` work too.

    Raises:
        ValueError: shapes differ (see :func:`match_spatial`), or not one variance per channel.
    """
    _checks.same_shape("predicted_NDHW", predicted_NDHW, "target_NDHW", target_NDHW)
    _checks.dims("variance_D", variance_D, 1)
    channels = predicted_NDHW.shape[1]
    if variance_D.shape[0] != channels:
        raise ValueError(f"variance_D: expected {channels} channels, found {variance_D.shape[0]}")
    variance = at_least_fp32(variance_D).view(1, -1, *[1] * (predicted_NDHW.dim() - 2))
    error = at_least_fp32(target_NDHW) - at_least_fp32(predicted_NDHW)
    return (0.5 * (variance.log() + error.square() / variance)).flatten(1).mean(dim=1)


def variance(rho_D: Tensor, eps: float = VARIANCE_EPS) -> Tensor:
    """The variance ``softplus(rho) + eps`` of each channel, ``[D]``: above 0 for every rho (VID)."""
    return F.softplus(at_least_fp32(rho_D)) + eps


def initial_rho(initial_variance: float = 5.0, eps: float = VARIANCE_EPS) -> float:
    """The rho at which :func:`variance` gives ``initial_variance``.

    Raises:
        ValueError: ``initial_variance`` is not above ``eps``.
    """
    soft = initial_variance - eps
    if not (math.isfinite(soft) and soft > 0):
        raise ValueError(f"initial_variance: expected a finite number > {eps}, found {initial_variance!r}")
    return soft + math.log(-math.expm1(-soft))


def match_spatial(a_NDHW: Tensor, b_NDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width, by adaptive average pooling; types and channels stay."""
    _checks.dims("a_NDHW", a_NDHW, 4)
    _checks.dims("b_NDHW", b_NDHW, 4)
    size_HW = (min(a_NDHW.shape[2], b_NDHW.shape[2]), min(a_NDHW.shape[3], b_NDHW.shape[3]))
    return _pooled(a_NDHW, size_HW), _pooled(b_NDHW, size_HW)


def _pooled(map_NDHW: Tensor, size_HW: tuple[int, int]) -> Tensor:
    if tuple(map_NDHW.shape[2:]) == size_HW:
        return map_NDHW
    return F.adaptive_avg_pool2d(at_least_fp32(map_NDHW), size_HW).to(map_NDHW.dtype)
