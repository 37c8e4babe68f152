"""The trainable side of a distillation: the student and every trainable of its objective, as one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Need, Signals
from dfkd_dist.objectives.distillation import Distillation


class StudentSide(nn.Module):
    """The student (or a generator's assistant) with its objective; one forward returns the named losses.

    Args:
        network: what is distilled into.
        objective: terms and their trainable heads; not exported.
    """

    def __init__(self, network: ImageNetwork, objective: Distillation) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self.need: Need = Distillation.need(objective.spec)

    def forward(self, batch: Batch, answers: Sequence[Signals]) -> Losses:
        """Losses on this rank's images: local sums over the global count."""
        return self.objective(self.network(batch.images_NCHW, self.need), answers, batch)
