"""The trainable side of a distillation: the student and every trainable of its objective, as one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from dfkd_dist.compensation.base import Compensation
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Need, Signals
from dfkd_dist.objectives.base import Objective


class StudentSide(nn.Module):
    """The student (or a generator's assistant) with its objective; one forward returns the named losses.

    Args:
        network: what is distilled into.
        objective: terms and their trainable heads (a module); not exported.
        compensation: what the objective sees of the network's logits (a module), or None for the logits themselves.
    """

    objective: Objective
    compensation: Compensation | None

    def __init__(self, network: ImageNetwork, objective: Objective, compensation: Compensation | None = None) -> None:
        super().__init__()
        self.network, self.objective, self.compensation = network, objective, compensation

    @property
    def need(self) -> Need:
        """Signals that the objective wants from the teachers."""
        return self.objective.need

    def forward(self, batch: Batch, answers: Sequence[Signals]) -> Losses:
        """Losses on this rank's images: local sums over the global count."""
        return self.objective(self._say, answers, batch)

    def _say(self, images_NCHW: Tensor, need: Need) -> Signals:
        signals = self.network(images_NCHW, need)
        if self.compensation is None:
            return signals
        return replace(signals, logits_NC=self.compensation(signals.logits_NC))
