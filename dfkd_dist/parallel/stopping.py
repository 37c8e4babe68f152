"""Stopping together and failing out loud: the stop flag, the heartbeats, and the one agreement per step.

A signal only sets a flag; the ranks agree at a step boundary and checkpoint together. A rank that dies or freezes is
noticed by its missing heartbeats, named, and the others exit instead of waiting in a collective for ever.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.launch import LaunchFacts, open_store

EXIT_STOPPED = 75
"""Stopped on request after writing a checkpoint: start the same command again to go on (EX_TEMPFAIL)."""
EXIT_LOST_RANK = 76
"""A peer was lost; nothing was saved beyond the last checkpoint."""
EXIT_NONFINITE = 77
"""A loss or gradient was NaN or infinite."""

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_DONE = -1  # the counter of a rank that finished cleanly
_NO_VERDICT = "-"
_TICK_S = 0.25
_PAUSE_S = 3.0  # a gap this long between two ticks means that this process itself did not run


class StopFlag:
    """A context in which SIGTERM, SIGUSR2 and SIGINT only set ``signal``; the old handlers come back at its end.

    A second Ctrl-C raises KeyboardInterrupt, unless it follows within a second: under torchrun one key press
    arrives twice, from the terminal and from the agent. Main thread only (ValueError elsewhere).
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > 1.0:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self.signal = self.signal or signal.Signals(number).name


@dataclass(frozen=True)
class Agreement:
    """What any rank of the group asked for."""

    stop: bool
    failed: bool


def agree(group: Group, *, stop: bool, failed: bool) -> Agreement:
    """True wherever any rank says true, the same on every rank: one all-reduce of two bytes, none for a group of one.

    Every rank of the group must call it at the same step.
    """
    if group.size == 1:
        return Agreement(stop, failed)
    flags = torch.tensor([stop, failed], dtype=torch.uint8, device=group.device_type)
    stop_any, failed_any = group.all_reduce_max(flags).tolist()
    return Agreement(bool(stop_any), bool(failed_any))


@dataclass(frozen=True)
class Lost:
    """A rank that is gone, and how that was noticed."""

    rank: int
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} was lost: {self.why}"


class Heartbeats:
    """Every rank counts seconds in the store; a counter that stands still for ``limit_s`` is a lost rank.

    Rank 0 reads all counters in one request and publishes the first lost rank; the others read rank 0's counter and
    that verdict, so the cost per rank does not grow with the world. Staleness is judged on the reader's own
    monotonic clock. Two threads: one talks to the store, the other only looks at clocks, because a request to a
    frozen store host blocks without a timeout. If the process has not left ``grace_s`` after a verdict (it may sit in
    a collective with the lost peer), the second thread prints the verdict and ends it with EXIT_LOST_RANK: at most
    limit + grace + about 3 s after the loss.

    Use it as a context right after `join`, on every rank; it does nothing for a single process. Leaving it cleanly
    (or by SystemExit) says goodbye, leaving it by another exception publishes that as the verdict.

    Args:
        facts: how this rank was launched; it says where the store is.
        interval_s: seconds between beats.
        limit_s: silence that means loss.
        grace_s: time for the main thread to leave by itself.
        first_beat_s: how long the last rank may come after the first; that is no silence yet.
    """

    def __init__(
        self,
        facts: LaunchFacts,
        *,
        interval_s: float = 1.0,
        limit_s: float = 8.0,
        grace_s: float = 4.0,
        first_beat_s: float = 60.0,
    ) -> None:
        self._facts = facts
        self._interval_s, self._limit_s = interval_s, limit_s
        self._grace_s, self._first_beat_s = grace_s, first_beat_s
        self._watched = list(range(facts.world_size)) if facts.rank == 0 else [0]
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(self._watched, 0)
        self._changed: dict[int, float] = {}
        self._answered = self._ticked = 0.0
        self._store_error: str | None = None
        self._verdict: Lost | None = None
        self._closing, self._closed = threading.Event(), threading.Event()
        self._failure: str | None = None
        self._published = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._facts.world_size == 1:
            return self
        self._store = open_store(self._facts, self._first_beat_s)
        for rank in self._watched:
            self._store.add(_count_key(rank), 0)  # creates what is not there yet, so that no read waits
        self._store.compare_set("verdict", "", _NO_VERDICT)
        self._store.set(f"who/{self._facts.rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.add(_count_key(self._facts.rank), 1)  # the first beat, so that a loss counts from here on
        self._answered = self._ticked = time.monotonic()
        self._changed = dict.fromkeys(self._watched, self._answered)
        for target in (self._talk, self._watch):
            thread = threading.Thread(target=target, name=f"heartbeats{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Say goodbye; ``error`` (other than SystemExit) tells the peers that this rank failed, and by what.

        A rank 0 that hosts the store stays for up to 5 s until the others have said goodbye as well.
        """
        if not self._threads or self._closing.is_set():
            return
        if error is not None and not isinstance(error, SystemExit):
            self._failure = f"it stopped with {type(error).__name__}: {str(error)[:300]}"
        self._closing.set()
        self._threads[0].join(timeout=7.0 if self.lost() is None else 2 * self._interval_s + 1.0)
        # With a lost peer the way out of the process may block too, so the second thread keeps its deadline.
        if self.lost() is None:
            self._closed.set()

    def lost(self) -> Lost | None:
        """The lost rank, if there is one; the first verdict stays."""
        if not self._threads:
            return None
        with self._lock:
            now = time.monotonic()
            self._forgive_own_pause(now)
            if self._verdict is None and not self._closed.is_set():
                self._verdict = self._store_lost(now) or self._stale(now)
            return self._verdict

    def explain(self, error: BaseException, *, wait_s: float | None = None) -> str:
        """Why a collective raised ``error``: waits (by default limit + 4 s) for a verdict; a sentence either way."""
        wait_s = self._limit_s + 4.0 if wait_s is None else wait_s
        here = f"{type(error).__name__}: {str(error)[:300]}"
        end = time.monotonic() + wait_s
        while self._threads and time.monotonic() < end:
            if lost := self.lost():
                return f"{lost} (rank {self._facts.rank} saw {here})"
            time.sleep(0.05)
        return f"no rank was found lost, so the cause is on rank {self._facts.rank} or in the network: {here}"

    # The thread that talks to the store.

    def _talk(self) -> None:
        try:
            while not self._closing.wait(self._interval_s):
                self._exchange()
            self._say_goodbye()
        except RuntimeError as error:  # every error of a store is one; retrying would only hide the loss
            with self._lock:
                self._store_error = str(error).splitlines()[0]

    def _exchange(self) -> None:
        self._store.add(_count_key(self._facts.rank), 1)
        self._read()
        lost = self.lost()
        if lost is not None and self._facts.rank == 0 and not self._published:
            self._publish(lost)

    def _read(self) -> None:
        answers = self._store.multi_get([*map(_count_key, self._watched), "verdict"])
        now = time.monotonic()
        with self._lock:
            self._answered = now
            for rank, answer in zip(self._watched, answers, strict=False):
                if int(answer) != self._counts[rank]:
                    self._counts[rank], self._changed[rank] = int(answer), now
            verdict = answers[-1].decode()
            if verdict != _NO_VERDICT and self._verdict is None:
                self._verdict = Lost(**json.loads(verdict))

    def _publish(self, lost: Lost) -> None:
        key = f"who/{lost.rank}"
        who = f" ({self._store.get(key).decode()})" if self._store.check([key]) else ""
        verdict = json.dumps({"rank": lost.rank, "why": lost.why + who})
        self._store.compare_set("verdict", _NO_VERDICT, verdict)
        self._published = True

    def _say_goodbye(self) -> None:
        hosts = self._facts.rank == 0 and not self._facts.agent_store
        verdict = self.lost() if self._failure is None else Lost(self._facts.rank, self._failure)
        if verdict is not None:
            self._publish(verdict)
            time.sleep(2 * self._interval_s if hosts else 0.0)  # so that the others can read it
            return
        self._store.set(_count_key(self._facts.rank), str(_DONE))
        end = time.monotonic() + 5.0
        while hosts and time.monotonic() < end and any(count != _DONE for count in self._counts.values()):
            time.sleep(0.05)
            self._read()

    # The thread that only looks at clocks.

    def _watch(self) -> None:
        since: float | None = None
        while not self._closed.wait(_TICK_S):
            lost = self.lost()
            if lost is None:
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > self._grace_s:
                # Not print(): the main thread may hold the lock of the stream.
                os.write(2, f"rank {self._facts.rank} exits because {lost}\n".encode())
                os._exit(EXIT_LOST_RANK)

    def _forgive_own_pause(self, now: float) -> None:
        # A suspended job wakes up with every clock far ahead; that is nobody's silence.
        gap = now - self._ticked
        if gap > _PAUSE_S:
            _log.warning("rank %d did not run for %.0f s; it starts its clocks anew", self._facts.rank, gap)
            self._answered += gap
            self._changed = {rank: at + gap for rank, at in self._changed.items()}
        self._ticked = now

    def _store_lost(self, now: float) -> Lost | None:
        silent = now - self._answered
        if self._counts[0] == _DONE or (self._store_error is None and silent <= self._limit_s):
            return None
        facts = self._facts
        host = "the launcher's agent on the first node hosts" if facts.agent_store else "rank 0 hosts"
        problem = self._store_error or f"no answer for {silent:.0f} s"
        return Lost(0, f"the store at {facts.master_addr}:{facts.master_port}, which {host}, is gone ({problem})")

    def _stale(self, now: float) -> Lost | None:
        for rank in self._watched:
            count, silent = self._counts[rank], now - self._changed[rank]
            limit_s = self._first_beat_s if count == 0 else self._limit_s
            if rank != self._facts.rank and count != _DONE and silent > limit_s:
                return Lost(rank, f"no heartbeat for {silent:.0f} s")
        return None


def _count_key(rank: int) -> str:
    return f"count/{rank}"
