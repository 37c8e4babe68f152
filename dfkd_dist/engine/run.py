"""A run from start to end on this rank: join, build, resume, fit, evaluate, write what came out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch

from dfkd_dist.config import Recipe
from dfkd_dist.data.stream.quarantine import FILE as QUARANTINE
from dfkd_dist.engine import evaluate, export, figures, quality, report
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.checkpoint import CheckpointError
from dfkd_dist.engine.checks import agreed
from dfkd_dist.engine.rundir import CHECKPOINTS, check_run, create_run, describe_run
from dfkd_dist.engine.state import RunState
from dfkd_dist.engine.trackers import Tracker
from dfkd_dist.engine.trainer import NonFinite, Stopped
from dfkd_dist.parallel.launch import LaunchFacts, join, launch_facts, leave
from dfkd_dist.parallel.mesh import world_group
from dfkd_dist.parallel.stopping import EXIT_LOST_RANK, EXIT_NONFINITE, EXIT_STOPPED, Heartbeats, StopFlag

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_S = 1800.0
T = TypeVar("T")


def run(
    recipe: Recipe,
    facts: LaunchFacts | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    session: type[Session] | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """Run a recipe on this rank; every rank of the launch calls it.

    Args:
        recipe: what to run.
        facts: from the launcher; None asks for them.
        resume: go on from the newest whole checkpoint.
        overwrite: delete an earlier run in the same directory.
        device: `auto`, `cpu` or `cuda`.
        session: other steps than those of a training run.

    Returns:
        The process's exit code (0, EXIT_STOPPED or EXIT_NONFINITE), and the summary where the run came to its end.

    Raises:
        ValueError: something was refused before any work (RecipeError, RunDirError, WeightsError, DatasetError ...).
        CheckpointError: no checkpoint is whole, or one could not be written.
        SystemExit: a peer was lost (EXIT_LOST_RANK); the message names it.
    """
    facts = facts or launch_facts()
    place = join(facts, timeout_s=COLLECTIVE_TIMEOUT_S, device=device)
    with Heartbeats(facts) as heartbeats, StopFlag() as stop_flag:
        try:
            going = (session or Session)(recipe, facts, place, stop_flag, resume=resume, overwrite=overwrite)
            with closing(going.build.trainer.source):
                return 0, going.go()
        except Stopped as stopped:
            log.warning("%s (%s); resume with --resume", stopped, stop_flag.signal)
            return EXIT_STOPPED, None
        except NonFinite as failure:
            log.error("%s", failure)
            return EXIT_NONFINITE, None
        except RuntimeError as error:
            if isinstance(error, CheckpointError) or facts.world_size == 1:
                raise
            # A collective breaks when a peer dies: say who, and do not try to checkpoint without it.
            explanation = heartbeats.explain(error)
            if heartbeats.lost() is None:
                raise
            log.error("%s", explanation)
            raise SystemExit(EXIT_LOST_RANK) from error
        finally:
            leave()


class Session:
    """The steps of one run, in order."""

    def __init__(
        self,
        recipe: Recipe,
        facts: LaunchFacts,
        device: torch.device,
        stop_flag: StopFlag,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.recipe, self.resume, self.first = recipe, resume, facts.rank == 0
        self.everyone = world_group(facts.rank, facts.world_size)
        self.path: Path = self._on_first(lambda: check_run(recipe, resume=resume, overwrite=overwrite))
        if overwrite:  # the readers of a stream would go on with the list of the earlier run
            self._on_first(lambda: (self.path / QUARANTINE).unlink(missing_ok=True))
        self.build: Build = build(recipe, device, facts.world_size, stop_flag)
        agreed(self.everyone, lambda: evaluate.check_set(self.build))
        self._on_first(lambda: create_run(self.path, recipe, overwrite=overwrite))
        self.state = RunState(self.build, self.path / CHECKPOINTS)
        self.before_s, self.started = 0.0, time.monotonic()

    def _on_first(self, act: Callable[[], T]) -> T:
        """Do it on rank 0; its result, or its error, is everybody's."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.first:
            try:
                outcome = (act(), None)
            except Exception as error:  # it must reach the others, who are waiting
                outcome = (None, error)
        value, failure = self.everyone.gather_objects(outcome)[0]
        if failure is not None:
            raise failure
        return value

    def seconds(self) -> float:
        """Wall time of the run, earlier parts included."""
        return self.before_s + time.monotonic() - self.started

    def go(self) -> dict[str, Any]:
        """Resume, fit, evaluate; the summary."""
        trainer, recipe = self.build.trainer, self.recipe
        if self.resume:
            seconds = self.state.restore()
            self.before_s = seconds or 0.0
            log.info("resumed at round %d", trainer.position.round) if seconds is not None else None
        if self.first:
            describe_run(self.path, recipe, self.build.mesh)
        self.tracker = Tracker(
            self.path, first=self.first, total_rounds=recipe.rounds.total, tensorboard=recipe.log.tensorboard
        )
        self.tracker.truncate(trainer.position.round)
        trainer.hooks.save = self._save
        trainer.hooks.observe = self._observed
        trainer.hooks.after_round = self._after_round
        self.images = (time.monotonic(), sum(trainer.meters.images.values()))
        trainer.fit()
        self._save()
        return self._finish()

    def _save(self) -> None:
        self.state.save(self.seconds())

    def _observed(self, round: int) -> bool:
        """Whether the next line of metrics falls at the end of this round."""
        return (round + 1) % self.recipe.log.every == 0 or round + 1 == self.recipe.rounds.total

    def _after_round(self, done: int) -> None:
        recipe, trainer = self.recipe, self.build.trainer
        if done % recipe.log.every == 0 or done == recipe.rounds.total:
            metrics = trainer.meters.read(self.build.mesh.world)
            self.tracker.log(done, self.seconds(), metrics | self._accuracy(done))
        self.tracker.progress(done, self._images_per_second())
        if recipe.log.grids and done == recipe.rounds.warmup:
            figures.save_grids(self.build, self.path, "warmup", real=evaluate.some_images(self.build))
        if recipe.checkpoint.every and done % recipe.checkpoint.every == 0 and done < recipe.rounds.total:
            self._save()

    def _images_per_second(self) -> float:
        """Through generators, assistants and the student, since this process started."""
        since, before = self.images
        return (sum(self.build.trainer.meters.images.values()) - before) / max(time.monotonic() - since, 1e-9)

    def _accuracy(self, done: int) -> dict[str, float]:
        spec = self.recipe.evaluation
        main = done - self.recipe.rounds.warmup
        if spec is None or not spec.every or main <= 0 or main % spec.every:
            return {}
        found = evaluate.evaluate(self.build, spec.dataset, "test", batch=spec.batch, parties=None, student_only=True)
        return dict(found.items())

    def _finish(self) -> dict[str, Any]:
        """Evaluate, export, draw; every rank takes part, rank 0 writes."""
        wall, spec, built = self.seconds(), self.recipe.evaluation, self.build
        found = validation = None
        if spec is not None:
            found = evaluate.evaluate(built, spec.dataset, "test", batch=spec.batch, parties=spec.split)
            if built.cards and evaluate.has_validation(built):
                validation = evaluate.evaluate(built, spec.dataset, "val", batch=spec.batch, parties=None)
        measured = quality.measure(built)
        summary = report.summarise(built, found, measured, wall_seconds=wall, validation=validation)
        if self.recipe.log.grids:
            figures.save_grids(built, self.path, "end", real=evaluate.some_images(built))
        if self.first:
            export.export_student(built, self.path / "student.safetensors", summary)
            report.write_summary(self.path, summary)
            figures.save_curves(self.path)
        self.tracker.close()
        return summary
