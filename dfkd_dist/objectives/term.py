"""One term of a distillation: what it wants to hear, its trainable heads, and its value on a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses import distillation
from dfkd_dist.losses.weighted import global_mean
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.statistics import gather_rows


@dataclass(frozen=True)
class Step:
    """What a term is computed from."""

    student: Signals
    answers: Sequence[Signals]
    """Every teacher's signals about the same images, in recipe order."""
    batch: Batch

    def mean(self, values_N: Tensor) -> Tensor:
        """Local sum over the global count."""
        return global_mean(values_N, self.batch.count, self.batch.mask_N)

    def zeros(self) -> Tensor:
        """`[N]`, to add to."""
        return self.student.logits_NC.new_zeros(len(self.student.logits_NC))


class Term(nn.Module):
    """A scalar: the local sum over the global count, or this rank's share of a term that couples the batch.

    Args:
        spec: the objective's section.
        context: shapes of signals, groups.
    """

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__()
        self.spec, self.context = spec, context

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """Signals that it compares."""
        return Needs.both()

    def forward(self, step: Step) -> Tensor:
        """The term on a batch."""
        raise NotImplementedError


def soft_target(logits: Sequence[Tensor], weights: Sequence[float], temperature: float, how: str) -> Tensor:
    """`[N, C]`, tempered: DFMF's mean of probabilities, or another way to make one target of several teachers."""
    if how == "mean_logits":
        return distillation.tempered_mean([distillation.mean_logits(logits, weights)], [1.0], temperature)
    if how == "lowest_entropy":
        probs = [distillation.tempered_mean([logits_NC], [1.0], temperature) for logits_NC in logits]
        return distillation.lowest_entropy_choice(torch.stack(probs))
    return distillation.tempered_mean(logits, weights, temperature)


def guesses(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The classes that the teachers together take for likeliest, int64 `[N]`."""
    return soft_target(logits, weights, 1.0, "mean_probabilities").argmax(dim=1)


def of_all_ranks(parts: Sequence[Tensor], batch: Batch, group: Group) -> tuple[list[Tensor], Tensor]:
    """Rows of the group's whole batch, and which of them are images; only the own ones carry gradient.

    Args:
        parts: matrices with a row for each of this rank's samples.
        batch: what they are about.
        group: who shares it.

    Returns:
        Each part as `[M, F]`, in the order of ranks, and bool `[M]`.
    """
    padded = None if batch.block is None else batch.block // batch.views
    given = list(parts)
    if batch.mask_N is not None:
        given = [part[batch.mask_N.bool()] for part in given]
    rows_MF, valid_M = gather_rows(torch.cat(given, dim=1), group, padded)
    return list(rows_MF.split([part.shape[1] for part in parts], dim=1)), valid_M


def ids_and_slots(batch: Batch, term: str) -> tuple[Tensor, Tensor]:
    """Sample ids and places in the global batch.

    Raises:
        ValueError: the source does not number its images.
    """
    if batch.ids_N is None or batch.slots_N is None:
        raise ValueError(f"objective.{term} needs a source that numbers its samples (source.kind: stream)")
    return batch.ids_N, batch.slots_N


def labels(batch: Batch) -> Tensor:
    """Class of every image, int64 `[N]`; recipes without labels are refused before."""
    return cast(Tensor, batch.labels_N)
