"""Images of a compiled file by FFCV's own pipeline.

FFCV's loader goes through its file in epochs of its own. Here each of its epochs is a few images of a request: our
order, seeks and prefetching stay what they are for tars, and so do our reading processes, which use one thread each.
Its batches are views of memory that the next batch overwrites, so they are copied out at once. Nothing is augmented:
FFCV draws its random numbers from generators that nobody can seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.compiled.about import Compiled
from dfkd_dist.data.compiled.extra import importing_ffcv
from dfkd_dist.data.stream.batch import Failure, Outcome

_AT_ONCE = 64
"""Images of one of FFCV's batches."""


class CompiledReader:
    """Reads requests; works in any process that it is sent to.

    Args:
        compiled: the file; pieces of a request have places in it as offsets.
    """

    preload: Sequence[str] = (__name__, "ffcv.loader", "ffcv.fields.decoders", "ffcv.traversal_order.base")
    """What reading processes import before they are forked."""

    def __init__(self, compiled: Compiled) -> None:
        self.size, self.channels = compiled.about.size, compiled.about.channels
        self._path, self._digest = str(compiled.path), compiled.manifest.digest
        self._bad = compiled.about.bad

    def read(self, pieces_3N: NDArray[np.int64], out_NCHW: Tensor | None = None) -> Outcome:
        """The images of a `Request`, in `out_NCHW` if given; a sample that the file lacks is zero and listed."""
        _, places_N, sizes_N = pieces_3N
        if out_NCHW is None:
            shape = (len(places_N), self.channels, self.size, self.size)
            out_NCHW = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        there_n = np.flatnonzero(places_N >= 0)
        for start in range(0, len(there_n), _AT_ONCE):
            rows_n = there_n[start : start + _AT_ONCE]
            images_nHWC = torch.from_numpy(self._pipeline().images(places_N[rows_n]))
            images_nCHW = images_nHWC[..., : self.channels].permute(0, 3, 1, 2)
            if len(there_n) == len(places_N):
                out_NCHW[start : start + len(rows_n)] = images_nCHW
            else:
                out_NCHW[torch.from_numpy(rows_n)] = images_nCHW
        failures = [self._failure(int(row), int(places_N[row])) for row in np.flatnonzero(places_N < 0)]
        for failure in failures:
            out_NCHW[failure.position] = 0
        return Outcome(out_NCHW, failures, int(sizes_N.sum()))

    def _pipeline(self) -> _Pipeline:
        return _pipeline(self._path, self._digest)

    def _failure(self, position: int, place: int) -> Failure:
        k = -1 - place
        if k < len(self._bad):
            return Failure(position, self._bad[k].cause, self._bad[k].detail)
        return Failure(position, "missing", f"{self._path} was compiled without it")


@functools.lru_cache(maxsize=4)
def _pipeline(path: str, digest: str) -> _Pipeline:
    """One for each file and process: it is compiled for a second or more when it is first used."""
    return _Pipeline(path)


class _Pipeline:
    """FFCV's loader, asked for one batch at a time."""

    def __init__(self, path: str) -> None:
        with importing_ffcv():
            from ffcv.fields.decoders import SimpleRGBImageDecoder
            from ffcv.loader import Loader, epoch_iterator

            # Else every reading process would open streams on the GPU, and hold memory there; pixels stay here.
            epoch_iterator.IS_CUDA = False
            self._order = _places()
            self._loader = Loader(
                path,
                batch_size=_AT_ONCE,
                num_workers=1,
                os_cache=True,
                order=self._order,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": None, "id": None},
                drop_last=False,
                batches_ahead=2,
            )
        # Made anew for each epoch it would cost several times the copying of raw images. One batch is in it at a time.
        memory = self._loader.graph.allocate_memory(_AT_ONCE, self._loader.batches_ahead + 2)
        self._loader.graph.allocate_memory = lambda *_: memory

    def images(self, places_n: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 `[n, S, S, 3]` of at most `_AT_ONCE` images, overwritten by the next call."""
        self._order.places = places_n.astype(np.uint64)
        threads = torch.get_num_threads()
        epoch = iter(self._loader)
        epoch.join()  # FFCV itself would wait for ever for a thread that failed
        torch.set_num_threads(threads)  # FFCV sets it to its own
        if epoch.output_queue.qsize() != 2:  # the batch, and its end
            raise RuntimeError(f"{self._loader.fname}: FFCV could not read {len(places_n)} images; it says why above")
        (images_nHWC,) = next(epoch)
        return images_nHWC  # type: ignore[no-any-return]


def _places() -> Any:
    """An order for FFCV's loader: an epoch is whatever stands in its `places`."""
    from ffcv.traversal_order.base import TraversalOrder

    class Places(TraversalOrder):  # type: ignore[misc]
        def __init__(self) -> None:
            self.places: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)

        def __call__(self, loader: Any) -> Places:  # FFCV asks for its order so
            return self

        def sample_order(self, epoch: int) -> NDArray[np.uint64]:
            return self.places

    return Places()
