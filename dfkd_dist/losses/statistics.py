"""The batch-norm term: synthetic images should give a network the feature statistics that it has stored.

These terms couple the images of a batch, so they take means and (biased) variances of the *global* batch,
measured at the inputs of the batch-norm layers over images and positions, and return a scalar.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32

FORMS = ("gaussian_kl", "l2")
CHANNELS = ("mean", "sum")
VARIANCE_FLOOR = 1e-5


class LayerStatistics(Protocol):
    """Statistics of one batch-norm layer, four vectors ``[C]``: of this batch, and stored in the network."""

    @property
    def mean_C(self) -> Tensor:
        """Mean of the batch."""

    @property
    def var_C(self) -> Tensor:
        """Biased variance of the batch."""

    @property
    def stored_mean_C(self) -> Tensor:
        """Running mean of the layer."""

    @property
    def stored_var_C(self) -> Tensor:
        """Running variance of the layer."""


def gaussian_kl(
    mean_C: Tensor,
    var_C: Tensor,
    stored_mean_C: Tensor,
    stored_var_C: Tensor,
    channels: str = "mean",
    floor: float = VARIANCE_FLOOR,
) -> Tensor:
    """Divergence of two Gaussians per channel, reduced over channels (DFMF, Eq. 4).

    ``D = ((mu_hat - mu)^2 + var_hat) / (2 var) - log(sigma_hat / sigma) - 1/2``, which is
    ``KL(N(mu_hat, var_hat) || N(mu, var))``. At least 0, and 0 at the stored statistics.

    Below ``floor`` (the size of batch norm's own epsilon) a stored variance counts as ``floor`` and the
    logarithm of a batch variance continues as its tangent. Elsewhere the equation holds as printed. The
    tangent, unlike a clamp, keeps a gradient that pulls an almost collapsed batch apart, and it takes
    variances that rounding made slightly negative.

    Args:
        mean_C: mean of the batch, ``[C]``.
        var_C: biased variance of the batch, ``[C]``.
        stored_mean_C: running mean, ``[C]``.
        stored_var_C: running variance, ``[C]``.
        channels: ``"mean"`` or ``"sum"`` over channels; the paper does not say which.
        floor: see above.

    Raises:
        ValueError: unequal shapes or an unknown ``channels``.
    """
    _checks.one_of("channels", channels, CHANNELS)
    _check_vectors(mean_C, var_C, stored_mean_C, stored_var_C)
    var = at_least_fp32(stored_var_C).clamp_min(floor)
    batch_var = at_least_fp32(var_C)
    shift = at_least_fp32(mean_C) - at_least_fp32(stored_mean_C)
    log_ratio = 0.5 * (_log_with_tangent(batch_var, floor) - var.log())
    divergence_C = (shift.square() + batch_var) / (2 * var) - log_ratio - 0.5
    return divergence_C.mean() if channels == "mean" else divergence_C.sum()


def l2_norms(mean_C: Tensor, var_C: Tensor, stored_mean_C: Tensor, stored_var_C: Tensor) -> Tensor:
    """``||mean - stored_mean||_2 + ||var - stored_var||_2``: norms, not squares (DeepInversion).

    The gradient at a difference of zero is zero.
    """
    _check_vectors(mean_C, var_C, stored_mean_C, stored_var_C)
    means = torch.linalg.vector_norm(at_least_fp32(mean_C) - at_least_fp32(stored_mean_C))
    variances = torch.linalg.vector_norm(at_least_fp32(var_C) - at_least_fp32(stored_var_C))
    return means + variances


def bn_loss(
    layers: Sequence[LayerStatistics],
    form: str = "gaussian_kl",
    channels: str = "mean",
    factors: Sequence[float] | None = None,
) -> Tensor:
    """The sum over batch-norm layers of ``factor * term`` (DFMF, Eq. 3, first term; DeepInversion).

    Args:
        layers: one :class:`LayerStatistics` per batch-norm layer, in the order of the forward pass.
        form: ``"gaussian_kl"`` or ``"l2"``.
        channels: for ``gaussian_kl`` only: ``"mean"`` or ``"sum"``.
        factors: one per layer, 1 by default; see :func:`first_layer_factors`.

    Raises:
        ValueError: no layers (the network has no batch norm), a wrong number of factors, or an unknown name.
    """
    _checks.one_of("form", form, FORMS)
    _checks.one_of("channels", channels, CHANNELS)
    if not layers:
        raise ValueError("layers: expected statistics of at least one batch-norm layer, found none")
    factors = [1.0] * len(layers) if factors is None else factors
    if len(factors) != len(layers):
        raise ValueError(f"factors: expected {len(layers)} (one per layer), found {len(factors)}")
    terms = [_layer_term(layer, form, channels) for layer in layers]
    return torch.stack([factor * term for factor, term in zip(factors, terms, strict=True)]).sum()


def first_layer_factors(count: int, first: float) -> list[float]:
    """Factors for ``count`` layers: ``first``, then 1 for all others (DeepInversion: 10, 1, 1, ...)."""
    return [first if index == 0 else 1.0 for index in range(count)]


def averaged(latest_C: Tensor, past_C: Tensor, momentum: float) -> Tensor:
    """``(1 - m) * latest + m * past``, the next value of a moving average; the past has no gradient.

    Fast (Fang et al. 2022) compares this, in the place of the batch's own statistics, with those that a network has
    stored: then one small batch need not look like all of the data.

    Raises:
        ValueError: unequal shapes, or a momentum that is not from 0 to below 1.
    """
    _checks.same_shape("latest_C", latest_C, "past_C", past_C)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum: expected a number from 0 to below 1, found {momentum!r}")
    return (1.0 - momentum) * latest_C + momentum * past_C.detach()


def _layer_term(layer: LayerStatistics, form: str, channels: str) -> Tensor:
    vectors = (layer.mean_C, layer.var_C, layer.stored_mean_C, layer.stored_var_C)
    return gaussian_kl(*vectors, channels=channels) if form == "gaussian_kl" else l2_norms(*vectors)


def _log_with_tangent(values: Tensor, floor: float) -> Tensor:
    """``log(x)`` down to ``floor``, below it the tangent at ``floor``: smooth, increasing, concave."""
    tangent = math.log(floor) + (values - floor) / floor
    return torch.where(values > floor, values.clamp_min(floor).log(), tangent)


def _check_vectors(mean_C: Tensor, var_C: Tensor, stored_mean_C: Tensor, stored_var_C: Tensor) -> None:
    _checks.dims("mean_C", mean_C, 1)
    _checks.same_shape("mean_C", mean_C, "var_C", var_C)
    _checks.same_shape("mean_C", mean_C, "stored_mean_C", stored_mean_C)
    _checks.same_shape("mean_C", mean_C, "stored_var_C", stored_var_C)
