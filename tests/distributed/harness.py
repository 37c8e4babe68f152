"""Run a function on several gloo ranks, cheaply: processes forked from one server that has imported torch already.

``run_ranks(fn, size, *args)`` returns what ``fn(rank, size, *args)`` returned on each rank; ``start_ranks`` hands out
the processes, for tests that kill them. ``fn`` must be a module-level function.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.parallel import launch

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = [
    "torch",
    "torch.distributed",
    "torchvision",
    "numpy",
    "dfkd_dist.parallel.stopping",
    "dfkd_dist.engine.run",
    "matplotlib.figure",
    "pytest",
]


class RanksFailed(AssertionError):
    """Some ranks raised, died or took too long; the message holds what each of them said."""


class Rank:
    """One running rank."""

    def __init__(self, rank: int, process: BaseProcess, connection: Connection, stderr: Path, hosted: object) -> None:
        self.rank, self.process, self._connection, self._stderr = rank, process, connection, stderr
        self._hosted = hosted  # a store of this process lives as long as the handles
        self._report: tuple[bool, Any] | None = None

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process.pid is not None
        return self.process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def exit_code(self, timeout: float) -> int | None:
        """The exit code (negative: the signal that ended it), or None if it still runs after ``timeout`` s."""
        self.process.join(timeout)
        return self.process.exitcode

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text(errors="replace")

    def report(self) -> tuple[bool, Any] | None:
        """(True, result) or (False, traceback) once the rank has said so, else None; does not wait."""
        try:
            if self._report is None and self._connection.poll():
                self._report = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            pass
        return self._report

    def end(self) -> None:
        """Kill it if it still runs (also if it is stopped) and free what it used."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self._connection.close()
        self._stderr.unlink(missing_ok=True)

    def waitables(self) -> list[Any]:
        """What to wait on for news of this rank."""
        return [] if self.report() is not None else [self._connection, self.process.sentinel]

    def failure(self) -> str | None:
        """The traceback or the way it died; None while it runs or if it returned."""
        code = self.process.exitcode  # asked first: whatever it said, it said before
        report = self.report()
        if report is not None:
            return None if report[0] else report[1]
        if code is None:
            return None
        return f"died with exit code {code}\n{self.stderr()[-3000:]}"


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(rank, size, *args)`` on ``size`` joined ranks and return the results in rank order.

    Raises RanksFailed with every rank's traceback if one fails; the others are killed, as they are after ``timeout``
    seconds.
    """
    ranks = start_ranks(fn, size, *args, timeout=timeout)
    try:
        _await(ranks, time.monotonic() + timeout)
        reports = [rank.report() for rank in ranks]
        if all(report is not None and report[0] for report in reports):
            return [report[1] for report in reports if report is not None]
        raise RanksFailed(_describe(ranks, timeout))
    finally:
        for rank in ranks:
            rank.end()


def start_ranks(
    fn: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0, agent_store: bool = False
) -> list[Rank]:
    """Start the ranks of `run_ranks` and return them; the caller ends each with ``end()``.

    Rank 0 hosts the store; with ``agent_store`` this process does, as a launcher's agent would.
    """
    context = _server()
    port, hosted = _store_port(agent_store)
    ranks = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        handle, name = tempfile.mkstemp(prefix=f"rank{rank}_", suffix=".stderr")
        os.close(handle)
        environment = _environment(rank, size, port, agent_store)
        process = context.Process(
            target=_main, args=(sender, name, environment, timeout, fn, rank, size, args), daemon=True
        )
        process.start()
        sender.close()
        ranks.append(Rank(rank, process, receiver, Path(name), hosted))
    return ranks


def _await(ranks: list[Rank], end: float) -> None:
    while (left := end - time.monotonic()) > 0:
        waitables = [item for rank in ranks for item in rank.waitables()]
        if any(rank.failure() for rank in ranks):
            end = min(end, time.monotonic() + 3.0)  # time for the others to say what they saw
            ranks = [rank for rank in ranks if not rank.failure()]
        if not waitables or not ranks:
            return
        wait(waitables, timeout=min(left, 0.5))


def _describe(ranks: list[Rank], timeout: float) -> str:
    said = [f"--- rank {rank.rank}: {rank.failure() or _state(rank, timeout)}" for rank in ranks]
    return "\n".join(["some ranks failed", *said])


def _state(rank: Rank, timeout: float) -> str:
    return "returned" if rank.report() else f"still running (limit {timeout:g} s)\n{rank.stderr()[-3000:]}"


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    # The server takes its sys.path from the environment only; without the checkout in it, preloading fails silently.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before["PYTHONPATH"]])])
    os.environ["OMP_NUM_THREADS"] = "1"
    ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def _store_port(agent_store: bool) -> tuple[int, Any]:
    if agent_store:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return store.port, store
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1], None


def _environment(rank: int, size: int, port: int, agent_store: bool) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
    }


def _main(
    sender: Connection, stderr: str, environment: dict[str, str], timeout: float,
    fn: Callable[..., Any], rank: int, size: int, args: tuple[Any, ...],
) -> None:  # fmt: skip
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        launch.join(launch.launch_facts(), timeout_s=timeout, device="cpu")
        report = (True, fn(rank, size, *args))
        # Plain pickle, not torch's: its shared memory would die with this process.
        message = pickle.dumps(report)
        launch.leave()
    except Exception:
        message = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
