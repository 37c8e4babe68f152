"""Numbered jobs over several processes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from dfkd_dist.data.errors import DatasetError

Item = TypeVar("Item")
T = TypeVar("T")
_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@dataclass(frozen=True)
class _Failed:
    """An error on its way to the parent, without a worker's traceback around it."""

    message: str


class _Jobs(Dataset[Any], Generic[Item, T]):
    """The jobs as a data set, for a loader's workers."""

    def __init__(self, act: Callable[[Item], T]) -> None:
        self._act = act

    def __getitem__(self, item: Item) -> T | _Failed:
        try:
            return self._act(item)
        except (DatasetError, OSError) as error:
            return _Failed(str(error))


def spread(act: Callable[[Item], T], items: Iterable[Item], workers: int) -> Iterator[T]:
    """`act(item)` for each item, as results become ready, in `workers` processes (0 or 1: in this one).

    Items are taken a few at a time. Raises DatasetError for the first job that raised one, or an OSError; the others
    are abandoned.
    """
    jobs = _Jobs(act)
    results: Iterator[T | _Failed]
    if workers <= 1:
        results = map(jobs.__getitem__, items)
    else:
        loader = DataLoader(
            jobs,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_begin, os.getpid()),
            in_order=False,
            multiprocessing_context="fork",  # a worker starts at once, and shares an input that lies in memory
        )
        results = iter(loader)
    for result in results:
        if isinstance(result, _Failed):
            raise DatasetError(result.message)
        yield result


def default_workers() -> int:
    """As many as this process may use cores, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _as_it_is(result: T) -> T:
    return result


def _begin(parent: int, _: int) -> None:
    """A worker leaves Ctrl-C to its parent, without a traceback of its own, and dies with it, however that dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # where the C library has no prctl, workers notice within seconds
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
