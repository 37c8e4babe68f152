"""What a student's side asks of an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.signals import Batch, Need, Signals

Student = Callable[[Tensor, Need], Signals]
"""One pass of the network that learns: images `[N, C, H, W]` and the signals that are wanted."""


class Objective(Protocol):
    """Terms and their trainable heads; a module, so that the heads train with the student."""

    @property
    def need(self) -> Need:
        """Signals wanted from the teachers."""
        ...

    @property
    def views(self) -> int:
        """Versions of every image that a batch must hold (1: the image alone)."""
        ...

    def __call__(self, student: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named losses on this rank's images: local sums over the global count.

        Args:
            student: called once for each pass, in the order in which batch norm shall see the images.
            answers: every teacher's signals about `batch.images_NCHW`, in recipe order.
            batch: images, and what is known of them.
        """
        ...
