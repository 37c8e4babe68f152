"""Whole runs on ranks: one after another in the same processes, with trouble at chosen steps, and what they left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine import checkpoint
from dfkd_dist.engine.run import run
from dfkd_dist.engine.rundir import CHECKPOINTS
from dfkd_dist.engine.trackers import METRICS, read_metrics
from dfkd_dist.engine.trainer import Trainer
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.launch import LaunchFacts, launch_facts, leave, open_store

Tree = dict[str, Any]
WAITING = "waiting for a signal"


@dataclass(frozen=True)
class Leg:
    """One run, or a part of it: to the end, or until the last rank gets a SIGTERM before its step `stop_at`."""

    tree: Tree
    stop_at: int | None = None
    resume: bool = True


@contextmanager
def before_step(number: int | None, act: Callable[[Trainer], None]) -> Iterator[None]:
    """Call `act` before the step with this number, counted from 1 and from here on; None: before every step."""
    original, count = Trainer._step, 0

    def step(self: Trainer, played: Any) -> bool:
        nonlocal count
        count += 1
        if number is None or count == number:
            act(self)
        return original(self, played)

    Trainer._step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._step = original  # type: ignore[method-assign]


def travel(rank: int, size: int, legs: list[Leg]) -> list[int]:
    """Exit codes of runs one after another, each joining anew; without a launcher it is a single process."""
    codes = []
    for attempt, leg in enumerate(legs, start=1):
        stop_at = leg.stop_at if rank == size - 1 else 0
        with before_step(stop_at or 0, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)):
            codes.append(run(parse(Recipe, leg.tree), anew(attempt), resume=leg.resume, device="cpu")[0])
    return codes


_stores: list[Any] = []


def anew(attempt: int = 1) -> LaunchFacts:
    """Leave the ranks that the harness joined, and the facts to join them again with; a number may serve once."""
    facts = launch_facts()
    if facts.world_size > 1 and not _stores:
        # The store lives on: whoever comes early must not meet the one that rank 0 is about to close.
        _stores.append(open_store(facts, 60.0, serve=facts.rank == 0))
    leave()
    return replace(facts, attempt=attempt)


def die(rank: int, size: int, tree: Tree, who: int, trouble: str, at: int) -> None:
    """One run that ends the process with its exit code; rank `who` gets into trouble before its step `at`."""
    with before_step(at if rank == who else 0, TROUBLES[trouble]):
        sys.exit(run(parse(Recipe, tree), anew(), device="cpu")[0])


def _kill(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_while_saving(trainer: Trainer) -> None:
    checkpoint._write_durably = lambda path, content: os.kill(os.getpid(), signal.SIGKILL)


def _await_signal(trainer: Trainer) -> None:
    print(WAITING, file=sys.stderr, flush=True)
    end = time.monotonic() + 60.0
    while trainer.stop_flag.signal is None and time.monotonic() < end:
        time.sleep(0.01)


TROUBLES: dict[str, Callable[[Trainer], None]] = {
    "kill": _kill,
    "kill while saving": _kill_while_saving,
    "await signal": _await_signal,
}


# ---------------------------------------------------------------------------------------- what a run left


def saved(folder: Path) -> list[str]:
    """Names in the folder of checkpoints, leftovers included."""
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


def state(folder: Path) -> dict[str, Any]:
    """Every part of the newest whole checkpoint."""
    found = checkpoint.latest(folder / CHECKPOINTS, ALONE)
    assert found is not None
    return {part: found.part(part) for part in found.files}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the time."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder / METRICS)]


def differences(a: Any, b: Any, where: str = "") -> dict[str, float]:
    """Where two nested states are not equal bit by bit, and by how much at most (NaN: in kind)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype == b.dtype and torch.equal(a, b):
            return {}
        comparable = a.shape == b.shape and a.numel() > 0
        return {where: float((a.double() - b.double()).abs().max()) if comparable else float("nan")}
    if isinstance(a, dict) and isinstance(b, dict):
        inside = [differences(a.get(k), b.get(k), f"{where}/{k}") for k in a.keys() | b.keys()]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        inside = [differences(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        inside = [] if a == b else [{where: abs(a - b) if numbers else float("nan")}]
    return {place: value for part in inside for place, value in part.items()}
