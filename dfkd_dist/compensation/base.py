"""What the training loop asks of a compensation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dfkd_dist.models.signals import Batch, Signals


class Compensation(Protocol):
    """De-confounds the student's logits; a module, whose trainables train with the student."""

    def update(self, round: int, batch: Batch, answers: Sequence[Signals]) -> None:
        """Before the first student step of a round: learn from what the teachers said about its images.

        Args:
            round: r.
            batch: this rank's images of that step.
            answers: every teacher's signals about them.
        """
        ...

    def __call__(self, logits_NC: Tensor) -> Tensor:
        """The compensated logits `[N, C]`."""
        ...
