"""Trouble in real runs on real ranks: signals, killed ranks, poisoned numbers and full disks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine import checkpoint
from dfkd_dist.engine import run as running_run
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.checkpoint import CheckpointError
from dfkd_dist.engine.trainer import Trainer
from dfkd_dist.models.signals import Signals
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.stopping import EXIT_LOST_RANK, EXIT_NONFINITE, EXIT_STOPPED
from tests import recipes
from tests.distributed import running
from tests.distributed.harness import Rank, run_ranks, start_ranks
from tests.distributed.running import Leg, Tree

pytestmark = pytest.mark.distributed

LIMIT_S = 20.0
SINGLE: Tree = {"train": "fp32", "teacher": "fp32"}
# Two warm-up rounds of one step, then rounds of three steps: generators, assistants, student.
ROUNDS: Tree = {"warmup": 2, "main": 3, "student_steps": 1}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    teachers = recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)
    changes = {"precision": SINGLE, "checkpoint": {"every": 1, "keep": 2}, "log": {"every": 2, "grids": False}}
    return recipes.dfmf(teachers, rounds=ROUNDS, **changes)


@pytest.fixture(scope="module")
def whole(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """State and metrics of the uninterrupted run on so many ranks, computed once."""
    known: dict[int, list[Any]] = {}

    def result(size: int) -> list[Any]:
        if size not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert run_ranks(running.travel, size, [Leg(tree | {"out": str(folder)})]) == [[0]] * size
            known[size] = _left(folder)
        return known[size]

    yield result


def _left(folder: Path) -> list[Any]:
    return [running.state(folder), running.metrics(folder)]


def _assert_goes_on(tree: Tree, folder: Path, size: int, whole: list[Any]) -> None:
    assert run_ranks(running.travel, size, [Leg(tree | {"out": str(folder)})]) == [[0]] * size
    assert not running.differences(whole, _left(folder))


def _exit_codes(ranks: list[Rank], within_s: float) -> list[int | None]:
    end = time.monotonic() + within_s
    return [rank.exit_code(max(0.0, end - time.monotonic())) for rank in ranks]


# --------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, 1), (signal.SIGUSR2, 0)])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(
    number: signal.Signals, who: int, tree: Tree, whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Step 4 is that of the assistants in round 2; rank `who` waits there until the signal has come.
    ranks = start_ranks(running.die, 2, tree | {"out": str(folder)}, who, "await signal", 4)
    try:
        end = time.monotonic() + 60.0
        while running.WAITING not in ranks[who].stderr():
            early = [code for code in _exit_codes(ranks, 0.0) if code is not None]
            assert not early and time.monotonic() < end, (early, [rank.stderr() for rank in ranks])
            time.sleep(0.05)
        ranks[who].send_signal(number)
        assert _exit_codes(ranks, LIMIT_S) == [EXIT_STOPPED] * 2, [rank.stderr() for rank in ranks]
        assert number.name in ranks[who].stderr() and "--resume" in ranks[0].stderr()
    finally:
        for rank in ranks:
            rank.end()
    assert running.saved(folder) == ["round_00000002_0000", "round_00000002_0002"]
    _assert_goes_on(tree, folder, 2, whole(2))


# ---------------------------------------------------------------------------------------- killed ranks


@dataclass(frozen=True)
class Loss:
    """Which rank of how many dies, when, and which checkpoints there are then."""

    size: int
    who: int
    trouble: str
    at: int
    left: tuple[str, ...]


TWO_ROUNDS = ("round_00000001_0000", "round_00000002_0000")
LOSSES = {
    # Step 4 lies in round 2, of which nothing is saved.
    "rank 0 of 2": Loss(2, 0, "kill", 4, TWO_ROUNDS),
    "rank 1 of 2": Loss(2, 1, "kill", 4, TWO_ROUNDS),
    # Step 5 is the last of round 2, after which a checkpoint is due.
    "rank 1 of 2 while saving": Loss(2, 1, "kill while saving", 5, (".tmp_round_00000003_0000", *TWO_ROUNDS)),
    "rank 2 of 4": Loss(4, 2, "kill", 5, TWO_ROUNDS),
}


@dataclass(frozen=True)
class Aftermath:
    """What was seen: seconds until the last survivor left, exit codes, their stderr, and the run's directory."""

    seconds: float
    codes: list[int | None]
    stderr: list[str]
    folder: Path
    saved: list[str]


@pytest.fixture(scope="module")
def aftermaths(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Aftermath]]:
    """All losses at once, since each is mostly waiting."""
    folders = {name: tmp_path_factory.mktemp("lost") / "run" for name in LOSSES}
    jobs = {
        name: start_ranks(running.die, loss.size, tree | {"out": str(folders[name])}, loss.who, loss.trouble, loss.at)
        for name, loss in LOSSES.items()
    }
    try:
        dead = {name: _await_death(jobs[name][loss.who]) for name, loss in LOSSES.items()}
        yield {name: _aftermath(jobs[name], LOSSES[name].who, dead[name], folders[name]) for name in LOSSES}
    finally:
        for job in jobs.values():
            for rank in job:
                rank.end()


def _await_death(rank: Rank) -> float:
    assert rank.exit_code(60.0) == -signal.SIGKILL, rank.stderr()
    return time.monotonic()


def _aftermath(ranks: list[Rank], who: int, dead_at: float, folder: Path) -> Aftermath:
    survivors = [rank for rank in ranks if rank.rank != who]
    codes = _exit_codes(survivors, dead_at + LIMIT_S - time.monotonic())
    stderr = [rank.stderr() for rank in survivors]
    return Aftermath(time.monotonic() - dead_at, codes, stderr, folder, running.saved(folder))


@pytest.mark.parametrize("name", LOSSES)
def test_survivors_of_a_killed_rank_name_it_and_leave(name: str, aftermaths: dict[str, Aftermath]) -> None:
    loss, seen = LOSSES[name], aftermaths[name]
    print(f"{name}: {seen.seconds:.1f} s")
    assert seen.codes == [EXIT_LOST_RANK] * (loss.size - 1), seen.stderr
    assert all(f"rank {loss.who} was lost" in said for said in seen.stderr), seen.stderr
    assert seen.saved == list(loss.left)


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_that_lost_a_rank_goes_on_as_if_nothing_had_been(
    name: str, aftermaths: dict[str, Aftermath], tree: Tree, whole: Any
) -> None:
    folder, size = aftermaths[name].folder, LOSSES[name].size
    _assert_goes_on(tree, folder, size, whole(size))
    assert running.saved(folder) == ["round_00000004_0000", "round_00000005_0000"]


# ------------------------------------------------------------------------------------ non-finite numbers


def _spoil_images(built: Build) -> None:
    """This rank's generator makes NaN in its own step of round 3."""

    def spoil(module: Any, args: Any, images_NCHW: Tensor) -> Tensor:
        return images_NCHW * float("nan") if _due(built) and images_NCHW.requires_grad else images_NCHW

    _generator(built).register_forward_hook(spoil)


def _spoil_gradient(built: Build) -> None:
    """Every loss is finite, but this rank's images get a gradient that is not."""

    def spoil(module: Any, args: Any, images_NCHW: Tensor) -> None:
        if _due(built) and images_NCHW.requires_grad:
            images_NCHW.register_hook(lambda gradient: gradient * float("inf"))

    _generator(built).register_forward_hook(spoil)


def _spoil_answers(built: Build) -> None:
    """This rank's teacher answers the student of round 3 with NaN."""

    def spoil(module: Any, args: Any, said: Signals) -> Signals:
        due = _due(built) and built.trainer.position.updates == 2
        return replace(said, logits_NC=said.logits_NC * float("nan")) if due else said

    built.teachers[0].register_forward_hook(spoil)


def _generator(built: Build) -> torch.nn.Module:
    return built.source.players[0].module


def _due(built: Build) -> bool:
    return built.trainer.position.round == 3


POISONS = {
    "images": (_spoil_images, "non-finite loss in round 3", "(rank 1: generator/t0/bn, generator/t0/ice"),
    "gradient": (_spoil_gradient, "non-finite gradient in round 3", "(rank 1: gradient of generator/t0)"),
    "answers": (_spoil_answers, "non-finite loss in round 3", "(rank 0: student/kl; rank 1: student/kl)"),
}


def poisoned(rank: int, size: int, tree: Tree, poison: str) -> tuple[int, str, bool]:
    """Exit code, what was logged, and whether all weights and optimisers stayed as before the last step."""
    builds: list[Build] = []
    before: list[Any] = []
    build = running_run.build

    def spoilt_build(*args: Any) -> Build:
        builds.append(build(*args))
        if rank == 1:
            POISONS[poison][0](builds[0])
        return builds[0]

    def remember(trainer: Trainer) -> None:
        before[:] = [_trained(trainer)]

    running_run.build = spoilt_build
    with running.before_step(None, remember), _logged() as said:
        code, _ = running_run.run(parse(Recipe, tree), running.anew(), device="cpu")
    return code, "\n".join(said), not running.differences(before[0], _trained(builds[0].trainer))


def _trained(trainer: Trainer) -> list[Any]:
    players = [trainer.student, *trainer.source.players]
    weights = [[p.detach().clone() for p in player.parameters] for player in players]
    moments = [
        [v.clone() for s in player.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        for player in players
    ]
    return [weights, moments, [player.steps for player in players]]


@contextmanager
def _logged() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dfkd_dist").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("dfkd_dist").removeHandler(handler)


@pytest.mark.parametrize("poison", POISONS)
def test_a_number_that_is_not_finite_stops_all_before_the_step(poison: str, tree: Tree, tmp_path: Path) -> None:
    for code, said, unchanged in run_ranks(poisoned, 2, tree | {"out": str(tmp_path / "run")}, poison):
        assert code == EXIT_NONFINITE
        assert all(part in said for part in POISONS[poison][1:]), said
        assert unchanged
    assert running.saved(tmp_path / "run") == ["round_00000002_0000", "round_00000003_0000"]


# ------------------------------------------------------------------------------------------- full disks


def short_of_space(rank: int, size: int, tree: Tree) -> str:
    """Rank 1 cannot write its part of the third checkpoint; what the run raised."""
    write, calls = checkpoint._write_part, 0

    def fail(aside: Path, part: str, state: Any) -> Any:
        nonlocal calls
        calls += part.startswith("generator")
        if rank == 1 and calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside / part))
        return write(aside, part, state)

    checkpoint._write_part = fail
    with pytest.raises(CheckpointError) as raised:
        running_run.run(parse(Recipe, tree), running.anew(), device="cpu")
    return str(raised.value)


def test_a_full_disk_of_one_rank_is_told_by_all_and_costs_nothing(tree: Tree, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = run_ranks(short_of_space, 2, tree | {"out": str(folder)})
    assert said[0] == said[1]
    assert "rank 1: OSError" in said[0] and "No space left on device" in said[0] and "rank 0" not in said[0]
    assert running.saved(folder) == ["round_00000001_0000", "round_00000002_0000"]
    _assert_goes_on(tree, folder, 2, whole(2))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        mounting = subprocess.run(command, capture_output=True)
        if mounting.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {mounting.stderr.decode().strip()}")
        return place

    yield make
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_leaves_the_last_checkpoint_good(mount: Callable[[int], Path], tmp_path: Path) -> None:
    changes: Tree = {"precision": SINGLE, "checkpoint": {"every": 2, "keep": 3}, "log": {"grids": False}}
    tree = recipes.labelled(tmp_path, **changes)
    assert running.travel(0, 1, [Leg(tree | {"out": str(tmp_path / "whole")})]) == [0]
    newest = checkpoint.latest(tmp_path / "whole" / "checkpoints", ALONE)
    assert newest is not None
    small = mount(int(2.7 * sum(file.stat().st_size for file in newest.path.iterdir())))
    tree |= {"out": str(small / "run")}
    with pytest.raises(CheckpointError, match="rank 0: OSError.*No space left on device: '.*student.pt'"):
        running.travel(0, 1, [Leg(tree)])
    assert running.saved(small / "run") == ["round_00000002_0000", "round_00000004_0000"]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
    assert running.travel(0, 1, [Leg(tree)]) == [0]
    assert not running.differences(_left(tmp_path / "whole"), _left(small / "run"))
