"""What runs in a reading process. Imported by the server that these processes are forked from, before it forks."""

from __future__ import annotations

import os
import queue
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.data.stream.batch import Failure, Reader
from dfkd_dist.data.stream.ring import Ring


class Task(NamedTuple):
    """What to read, and where its images go."""

    pieces_3N: NDArray[np.int64]
    slot: int
    """Of the ring."""


class Answer(NamedTuple):
    """What came of a task besides its images."""

    failures: list[Failure]
    bytes_read: int
    error: Exception | None
    """An error that is no sample's fault; its notes say where it was raised."""


def main(connection: Connection, reader: Reader, ring: Ring) -> None:
    """Answer tasks in order until the rank closes its end or dies; the rank alone decides when that is."""
    leave_signals_to_the_rank()
    torch.set_num_threads(1)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while True:
        pieces_3N, slot = tasks.get()
        try:
            outcome = reader.read(pieces_3N, ring.images(slot, pieces_3N.shape[1]))
            answer = Answer(outcome.failures, outcome.bytes_read, None)
        except Exception as error:  # the rank raises it
            answer = Answer([], 0, _portable(error))
        connection.send(answer)


def leave_signals_to_the_rank() -> None:
    """A scheduler signals every process of a job; a rank that wants to stop in order still needs its readers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _receive(connection: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    """Take in tasks at once, so that the rank never waits to hand one over; their end is the end of the process."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """An error of the same kind if that can be sent, with its traceback as a note."""
    said = "".join(traceback.format_exception(error))
    plain: Exception
    try:
        plain = type(error)(*error.args)
    except Exception:  # some errors cannot be made from their own arguments
        plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.add_note(f"in a reading process:\n{said}")
    return plain
