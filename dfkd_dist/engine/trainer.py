"""The one training loop. It reads like Algorithm 1 of DFMF and names no method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.engine.metrics import Meters
from dfkd_dist.engine.student_side import StudentSide
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import StopFlag, agree
from dfkd_dist.sources.base import Source


class Stopped(Exception):
    """A signal asked for a stop; all ranks agreed and the state is on disk."""


class NonFinite(Exception):
    """A loss or gradient was NaN or infinite on some rank; nobody took the step. Names rank, player and terms."""


@dataclass
class Position:
    """Where a run is: everything done before it is in the state."""

    round: int = 0
    updates: int = 0
    """Inner steps done in this round."""
    student: int = 0
    """Student steps done in this round."""


@dataclass
class Hooks:
    """What happens beside training; each is called on all ranks at the same point."""

    save: Callable[[], None] = lambda: None
    after_round: Callable[[int], None] = lambda round: None
    observe: Callable[[int], bool] = lambda round: False


class Trainer:
    """Runs rounds: the source makes images, the teachers answer, the student learns.

    Args:
        source: where images come from.
        student: the player over the student's side.
        exchange: images out, answers back.
        mesh: groups.
        warmup: rounds without student steps.
        rounds: all rounds.
        student_steps: student steps of a main round; None where the source says it (`Source.student_steps`), and the
            student's schedule then goes by rounds.
        meters: sums of losses and times.
        stop_flag: set by a signal.
        autocast: number format of the student's pass.
    """

    def __init__(
        self,
        source: Source,
        student: Player,
        exchange: Exchange,
        mesh: Mesh,
        warmup: int,
        rounds: int,
        student_steps: int | None,
        meters: Meters,
        stop_flag: StopFlag,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        assert isinstance(student.module, StudentSide)
        self.source, self.student, self.exchange, self.mesh = source, student, exchange, mesh
        self.side: StudentSide = student.module
        self.warmup, self.rounds, self._main_steps = warmup, rounds, student_steps
        self.meters, self.stop_flag, self.autocast = meters, stop_flag, autocast
        self.position, self.hooks = Position(), Hooks()

    def student_steps(self, round: int) -> int:
        """0 during warm-up."""
        if round < self.warmup:
            return 0
        return self.source.student_steps(round) if self._main_steps is None else self._main_steps

    def fit(self) -> None:
        """From the present position to the last round.

        Raises:
            Stopped: after a stop signal, with the state saved.
            NonFinite: a loss was not finite; the state is that of the last good step.
        """
        at = self.position
        while at.round < self.rounds:
            observe = self.hooks.observe(at.round)
            while at.updates < self.source.update_steps(at.round):
                phase = self.source.update_phase(at.round, at.updates)
                with self.meters.time(phase, self.source.update_images(at.round, at.updates)):
                    stop = self._step(self.source.update(at.round, at.updates, self.side.network, observe))
                at.updates += 1
                self._stop_if(stop)
            if self._main_steps is None:
                self.student.progress = (at.round - self.warmup) / (self.rounds - self.warmup)
            while at.student < self.student_steps(at.round):
                with self.meters.time("exchange"):
                    batch = self.source.batch(at.round, at.student)
                    answers = self.exchange.answers(batch)
                if at.student == 0 and self.side.compensation is not None:
                    with self.meters.time("compensation"):
                        self.side.compensation.update(at.round, batch, answers)
                with self.meters.time("student", batch.count):
                    with self.autocast():
                        losses = self.side(batch, answers)
                    stop = self._step([(self.student, losses)])
                at.student += 1
                self._stop_if(stop)
            at.round, at.updates, at.student = at.round + 1, 0, 0
            self.hooks.after_round(at.round)

    def _step(self, played: Iterable[tuple[Player, Losses]]) -> bool:
        """Differentiate every player's loss, agree with all ranks, then let every player step; whether to stop.

        A step without players (a stream that is being scored) only asks whether to stop.
        """
        turns: list[tuple[Player, Losses]] = []
        sound: list[Tensor] = []
        for player, losses in played:
            total = losses.total
            player.backward(total)
            sound += [total.detach().isfinite(), player.finite()]
            self.meters.add(player.name, losses)
            turns.append((player, losses))
        # The flags of all players are asked for at once: a step waits for the device once, not once a player.
        failed = bool(sound) and not torch.stack(sound).all()
        agreed = agree(self.mesh.world, stop=self.stop_flag.signal is not None, failed=failed)
        if agreed.failed:
            raise NonFinite(self._who_failed(turns))
        for player, _ in turns:
            player.step()
        return agreed.stop

    def _who_failed(self, turns: list[tuple[Player, Losses]]) -> str:
        terms = [f"{player.name}/{term}" for player, losses in turns for term in losses.nonfinite()]
        gradients = [f"gradient of {player.name}" for player, _ in turns if not player.finite()]
        everywhere = self.mesh.world.gather_objects((terms, gradients))
        # A loss of one rank spoils the summed gradient of many: they are named only where every loss was finite.
        what = 0 if any(part[0] for part in everywhere) else 1
        named = [f"rank {rank}: {', '.join(part[what])}" for rank, part in enumerate(everywhere) if part[what]]
        kind, at = ("loss", "gradient")[what], self.position
        return f"non-finite {kind} in round {at.round} before the step was taken ({'; '.join(named)})"

    def _stop_if(self, stop: bool) -> None:
        if stop:
            self.hooks.save()
            raise Stopped(f"stopped by a signal in round {self.position.round}")
