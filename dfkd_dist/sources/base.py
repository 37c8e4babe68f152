"""What the training loop asks of a source of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Need, Signals
from dfkd_dist.parallel.player import Player


class Side(Protocol):
    """A network that learns from teachers, with its objective: the student's side, or an assistant's."""

    network: ImageNetwork

    @property
    def need(self) -> Need:
        """Signals that its objective wants from the teachers."""
        ...

    def __call__(self, batch: Batch, answers: Sequence[Signals]) -> Losses:
        """The losses on a batch that the teachers answered."""
        ...


class Source(Protocol):
    """Owns its generators, assistants and whatever else it trains to make images."""

    @property
    def players(self) -> Sequence[Player]:
        """What it trains on this rank; saved by name."""
        ...

    def update_steps(self, round: int) -> int:
        """Inner steps before the student's in a round; the same number on every rank."""
        ...

    def update_phase(self, round: int, step: int) -> str:
        """What inner step `step` of a round is called in timings."""
        ...

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One inner step: what each player on this rank minimises. The trainer differentiates and steps.

        Args:
            round: r.
            step: which inner step.
            student: to be read only.
            observe: also fill `Losses.report`.
        """
        ...

    def student_steps(self, round: int) -> int:
        """Student steps of a round, where the recipe leaves them to the source (`rounds.student_steps: epoch`)."""
        ...

    def batch(self, round: int, step: int) -> Batch:
        """This rank's images for student step `step` of a round."""
        ...

    def update_images(self, round: int, step: int) -> int:
        """Images that inner step `step` of a round takes on all ranks together, for throughput."""
        ...

    def close(self) -> None:
        """The run is over: end what reads ahead."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive inside a round besides the players, by names of the source's own.

        What belongs to a teacher has the teacher's name and is the same on every rank of its row; what belongs to all
        is given on rank 0 alone.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; a part is read from disk when it is asked for, so ask for own parts only."""
        ...
