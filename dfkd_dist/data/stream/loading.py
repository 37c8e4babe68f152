"""Requests to outcomes, in order and ahead of time, by reading processes or in the process itself."""

from __future__ import annotations

import multiprocessing
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import ModuleType

from dfkd_dist.data.stream import worker
from dfkd_dist.data.stream.batch import Outcome, Reader, Request
from dfkd_dist.data.stream.ring import Ring
from dfkd_dist.data.stream.worker import Answer, Task

_PRELOAD = ["dfkd_dist.data.stream._forkserver"]
_GRACE_S = 5.0


class Loader:
    """Reads a sequence of requests; a new sequence may be begun at any time.

    Request i goes to process i mod `workers`, and answers are taken in the same turn, so they come in order. The
    processes are torch's DataLoader's idea with less between: a pipe each, and images in a `Ring`. A dead process is
    seen at once, as its pipe closes; so is a dead rank by its processes.

    They come from a fork server: forking the rank itself would copy its threads' locks, its sockets and its CUDA
    context, and a process started from nothing imports torch for seconds. The server starts (in the background) when a
    loader is made, the processes when the first sequence is begun; they stay until `close`.

    Args:
        reader: reads a request.
        workers: processes; 0 reads in this one when asked.
        prefetch: outcomes that each keeps ready.
        count: samples of a request, at most.
        pin: whether images come in pinned memory, from where they go to a GPU without waiting.
    """

    def __init__(self, reader: Reader, workers: int, prefetch: int, count: int, pin: bool = False) -> None:
        self._reader, self._workers, self._pin = reader, workers, pin
        self._ahead = workers * prefetch
        self._ring = Ring(self._ahead, count, reader.size, reader.channels) if workers else None
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._pending: deque[tuple[Request, int]] = deque()
        self._turn = 0
        self._closed = False
        self._context = multiprocessing.get_context("forkserver")
        if workers:
            self._context.set_forkserver_preload([*_PRELOAD, *reader.preload])
            with _nobody_s_main():
                ensure_running()
        # Also at exit, where multiprocessing would wait for these processes for ever: they are deaf to its signal.
        self._end = Finalize(self, _end, (self._processes, self._pipes), exitpriority=10)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Outcome]]:
        """Begin a sequence; an earlier one ends. Requests are taken as far ahead as there are processes to read them.

        Raises:
            RuntimeError: a reading process died, or the loader is closed.
        """
        if self._closed:
            raise RuntimeError("reading from a stream that is closed")
        if self._ring is None:
            return ((request, self._pinned(self._reader.read(request.pieces_3N))) for request in requests)
        self._drain()
        return self._run(self._ring, iter(requests))

    def close(self) -> None:
        """End the reading processes, also in the middle of a request. May be called twice."""
        self._closed = True
        self._end()

    def _run(self, ring: Ring, requests: Iterator[Request]) -> Iterator[tuple[Request, Outcome]]:
        if not self._processes:
            self._start(ring)
        self._top_up(ring, requests)
        while self._pending:
            failures, bytes_read, error = self._answer()
            request, slot = self._pending.popleft()
            if error is not None:
                ring.release(slot)
                raise error
            images_NCHW = ring.lend(slot, len(request), self._pin)
            self._top_up(ring, requests)
            yield request, Outcome(images_NCHW, failures, bytes_read)

    def _top_up(self, ring: Ring, requests: Iterator[Request]) -> None:
        while len(self._pending) < self._ahead:
            request = next(requests, None)
            if request is None:
                return
            slot, number = ring.claim(), (self._turn + len(self._pending)) % self._workers
            self._pending.append((request, slot))
            try:
                self._pipes[number].send(Task(request.pieces_3N, slot))
            except OSError as error:
                raise self._died(number) from error

    def _answer(self) -> Answer:
        """What the process says whose turn it is."""
        try:
            answer: Answer = self._pipes[self._turn].recv()
        except (EOFError, OSError) as error:
            raise self._died(self._turn) from error
        self._turn = (self._turn + 1) % self._workers
        return answer

    def _drain(self) -> None:
        """Let the processes finish what an earlier sequence asked for."""
        while self._pending and self._ring is not None:
            self._answer()
            self._ring.release(self._pending.popleft()[1])

    def _start(self, ring: Ring) -> None:
        for number in range(self._workers):
            own, theirs = self._context.Pipe()
            process = self._context.Process(
                target=worker.main, args=(theirs, self._reader, ring), daemon=True, name=f"stream-reader-{number}"
            )
            with _nobody_s_main():
                process.start()
            theirs.close()
            self._pipes.append(own)
            self._processes.append(process)

    def _pinned(self, outcome: Outcome) -> Outcome:
        return outcome._replace(images_NCHW=outcome.images_NCHW.pin_memory()) if self._pin else outcome

    def _died(self, number: int) -> RuntimeError:
        """What to say of a closed pipe; the loader cannot be used any more."""
        process = self._processes[number]
        process.join(_GRACE_S)
        self.close()
        return RuntimeError(
            f"reading process {process.pid} of the stream died ({_how(process.exitcode)}); "
            "start the run again to go on from its last checkpoint"
        )


@contextmanager
def _nobody_s_main() -> Iterator[None]:
    """Start processes that do not run the program's main file again: they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end(processes: list[BaseProcess], pipes: list[Connection]) -> None:
    """A closed pipe ends a process even in the middle of a request; what does not listen is killed."""
    while pipes:
        pipes.pop().close()
    for process in processes:
        process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}" + (", as the system does when memory runs out" if code == -9 else "")
    return f"exit code {code}"
