"""The weighted sum of loss terms, once, and the mean over the global batch.

What is optimised (``terms``) and what is only reported (``report``) are kept apart.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32


@dataclass(frozen=True)
class Losses:
    """Named scalar terms, their weights, and detached scalars that are only shown.

    Raises:
        ValueError: a term has no weight.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    report: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a term without a weight now, not at the first use of the total."""
        for name in self.terms:
            if name not in self.weights:
                raise _checks.unknown_name("weights", name, self.weights)

    @property
    def total(self) -> Tensor:
        """``sum_i weight_i * term_i``, the scalar to differentiate.

        Raises:
            ValueError: there are no terms, so there is nothing to optimise.
        """
        if not self.terms:
            raise ValueError("terms: expected at least one term with a weight above 0, found none")
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()

    def nonfinite(self) -> list[str]:
        """Names of the terms whose value is NaN or infinite; waits for the device once."""
        if not self.terms:
            return []
        finite = torch.stack([term.detach().isfinite() for term in self.terms.values()]).tolist()
        return [name for name, ok in zip(self.terms, finite, strict=True) if not ok]

    def formula(self) -> str:
        """The sum in words, such as ``1.0*kl + 0.5*vid``; ``0`` when there are no terms."""
        return " + ".join(f"{self.weights[name]!r}*{name}" for name in self.terms) or "0"


def weighted(
    terms: Mapping[str, Callable[[], Tensor]],
    weights: Mapping[str, float],
    report: Mapping[str, Tensor] | None = None,
) -> Losses:
    """Compute the terms that have a weight above 0, in the order of ``terms``.

    Args:
        terms: for each name a function that computes a scalar; not called when its weight is 0 or absent.
        weights: finite numbers of at least 0; every name must be one of ``terms``.
        report: scalars to show; they are detached and never optimised.

    Raises:
        ValueError: a weight that names no term, a negative or non-finite weight, a term that is not a scalar,
            or a reported name that is also a term.
    """
    _check_weights(terms, weights)
    shown = {name: value.detach() for name, value in (report or {}).items()}
    values: dict[str, Tensor] = {}
    for name, compute in terms.items():
        if weights.get(name, 0.0) > 0:
            values[name] = compute()
            _checks.dims(f"term {name!r}", values[name], 0)
            if name in shown:
                raise ValueError(f"report: {name!r} is already an optimised term; allowed: any other name")
    return Losses(values, {name: float(weights[name]) for name in values}, shown)


def global_mean(values_N: Tensor, count: float | Tensor, mask_N: Tensor | None = None) -> Tensor:
    """The local part of a mean over the global batch: ``sum(values where mask) / count``, a scalar.

    Summed over ranks this is the mean; parameter gradients are likewise summed over ranks, never averaged.

    Args:
        values_N: per-sample values of this rank, ``[N]``; N may be 0.
        count: the number of valid samples on all ranks together, a float or a 0-d tensor. A tensor is not
            read (that would wait for the device): a count of 0 gives NaN, which
            :meth:`Losses.nonfinite` names.
        mask_N: ``[N]``, true where the sample is valid. A masked slot contributes exactly 0 to the value, and
            its entry of ``values_N`` gets gradient exactly 0, even where it is NaN. Upstream of ``values_N``
            this cannot help: 0 times a derivative that is NaN is NaN, so masked slots must hold images on
            which the networks are finite (zeros, say).

    Raises:
        ValueError: not a vector, a mask of another shape, or a float count that is not above 0.
    """
    _checks.dims("values_N", values_N, 1)
    if isinstance(count, Tensor):
        _checks.dims("count", count, 0)
    elif not (math.isfinite(count) and count > 0):
        raise ValueError(f"count: expected a finite number > 0, found {count!r}")
    values_N = at_least_fp32(values_N)
    if mask_N is not None:
        _checks.same_shape("values_N", values_N, "mask_N", mask_N)
        values_N = torch.where(mask_N.bool(), values_N, torch.zeros_like(values_N))
    return values_N.sum() / count


def _check_weights(terms: Mapping[str, object], weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if name not in terms:
            raise _checks.unknown_name("weights", name, terms)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights.{name}: expected a finite number >= 0, found {weight!r}")
