"""Batch-coupled quantities over a group: the global ones, from what each rank holds.

The global loss is the sum over ranks of each rank's loss. A term that every rank computes alike from reduced statistics
passes gradient only to this rank's part (identity backward), and stands in the sum once through `share_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_dist.parallel.group import Group


def gather_own(tensor: Tensor, group: Group) -> list[Tensor]:
    """Every member's tensor in the group's order; only this rank's own one carries gradient."""
    parts = group.gather(tensor.detach())
    parts[group.rank] = tensor
    return parts


def gather_rows(rows_NF: Tensor, group: Group, padded: int | None = None) -> tuple[Tensor, Tensor]:
    """Every member's rows, member after member; only this rank's own ones carry gradient.

    Members may hold unequal numbers of rows, or none; each is filled up with zeros.

    Args:
        rows_NF: this rank's.
        group: who shares them.
        padded: the same number on all members, at least the largest number of rows; None asks them for it, which
            waits for the device.

    Returns:
        Rows `[M, F]`, and which of them some member gave, bool `[M]`.

    Raises:
        ValueError: more rows than `padded`.
    """
    given = len(rows_NF)
    if group.size == 1:
        return rows_NF, torch.ones(given, dtype=torch.bool, device=rows_NF.device)
    if padded is None:
        padded = int(group.all_reduce_max(torch.tensor(given, device=rows_NF.device)))
    if given > padded:
        raise ValueError(f"{given} rows do not fit in a block of {padded}")
    marked = torch.cat([rows_NF, rows_NF.new_ones(given, 1)], dim=1)
    filled = torch.cat([marked, marked.new_zeros(padded - given, marked.shape[1])])
    everyone = torch.cat(gather_own(filled, group))
    return everyone[:, :-1], everyone[:, -1].detach() > 0


def sum_own(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group in rank order (so it is bit-equal on all ranks); gradient flows to the own part alone."""
    return torch.stack(gather_own(tensor, group)).sum(dim=0) if group.size > 1 else tensor


def share_of(value: Tensor, sync: Group, total: int) -> Tensor:
    """This rank's part of a batch-coupled term, so that the parts of `total` ranks add up to it.

    The value is divided by `total`. The gradient is divided by the number of separate copies of the term only
    (total / sync.size), because each member of `sync` already holds only its own images' part.
    """
    if total == 1:
        return value
    scale = sync.size / total
    return value.detach() / total + (value - value.detach()) * scale


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance per channel."""

    mean_C: Tensor
    var_C: Tensor


def combine_moments(layers: Sequence[Moments], count: int, group: Group) -> list[Moments]:
    """Moments of several layers over the union of the group's images, in one exchange (Chan et al. 1979).

    Args:
        layers: this rank's moments, all over `count` images.
        count: images on this rank.
        group: who shares the batch.
    """
    if group.size == 1 or not layers:
        return list(layers)
    sizes = [layer.mean_C.numel() for layer in layers]
    means = torch.cat([layer.mean_C for layer in layers])
    variances = torch.cat([layer.var_C for layer in layers])
    packed = torch.cat([means, variances, means.new_full((1,), count)])
    parts = torch.stack(gather_own(packed, group))
    mean_RC, var_RC, count_R1 = parts.split([sum(sizes), sum(sizes), 1], dim=1)
    mean, var = pooled(mean_RC, var_RC, count_R1)
    return [Moments(m, v) for m, v in zip(mean.split(sizes), var.split(sizes), strict=True)]


def pooled(mean_RC: Tensor, var_RC: Tensor, count_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the union of R sets from the moments of each; an empty set counts for nothing."""
    weight_R1 = count_R1 / count_R1.sum()
    empty = count_R1 == 0
    mean_RC = mean_RC.masked_fill(empty, 0.0)
    var_RC = var_RC.masked_fill(empty, 0.0)
    mean_C = (weight_R1 * mean_RC).sum(dim=0)
    var_C = (weight_R1 * (var_RC + (mean_RC - mean_C) ** 2)).sum(dim=0)
    return mean_C, var_C
