"""The extra that compiled files need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

HOW = (
    "It is compiled on the machine that uses it: install the Debian packages libopencv-core-dev libopencv-imgproc-dev "
    "libturbojpeg0-dev pkg-config g++ (or their like) and run scripts/install_ffcv.sh in a checkout; or, where all of "
    "libopencv-dev is installed, pip install 'dfkd-dist[ffcv]'"
)


def need_ffcv(what: str) -> None:
    """Raise ImportError, which says how to get FFCV, where it is not installed. Takes no time where it is."""
    if find_spec("ffcv") is None:
        raise ImportError(f"{what} needs FFCV, which is not installed. {HOW}")


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Around `import ffcv...`, which takes seconds: says how to get it, and undoes what it does to this process.

    FFCV sets torch's number of threads to 1. numba makes a lock that in a reading process (which is not made by a plain
    fork) would be reported as leaked at exit.
    """
    threads, method = torch.get_num_threads(), multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    except ImportError as error:
        raise ImportError(f"FFCV cannot be imported ({error}). {HOW}") from error
    finally:
        multiprocessing.set_start_method(method, force=True)  # type: ignore[arg-type]
        torch.set_num_threads(threads)
