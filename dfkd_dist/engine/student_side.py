"""The trainable side of a distillation: the student and every trainable of its objective, as one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Need, Signals
from dfkd_dist.objectives.base import Objective


class StudentSide(nn.Module):
    """The student (or a generator's assistant) with its objective; one forward returns the named losses.

    Args:
        network: what is distilled into.
        objective: terms and their trainable heads (a module); not exported.
    """

    objective: Objective

    def __init__(self, network: ImageNetwork, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    @property
    def need(self) -> Need:
        """Signals that the objective wants from the teachers."""
        return self.objective.need

    def forward(self, batch: Batch, answers: Sequence[Signals]) -> Losses:
        """Losses on this rank's images: local sums over the global count."""
        return self.objective(self.network, answers, batch)
