"""Memory that reading processes and the rank share: images are written there once and never sent."""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENT = 3
"""Batches that the rank may hold without a copy having been made; one being used, some kept for later."""


class Ring:
    """Slots for one batch each, used again and again: fresh memory would cost more than copying images into it.

    The memory is a nameless file (`memfd`), not one of /dev/shm, which is small in containers. A slot goes from free to
    claimed (a request is on its way or answered), to lent (the rank holds its images), and back when the last tensor on
    it is gone. Claims are never more than `claims`, and what would be one slot too many to lend is copied out instead.

    Args:
        claims: how many slots may be claimed at a time.
        count: images of a batch, at most.
        size: side in pixels.
        channels: of the images.
    """

    def __init__(self, claims: int, count: int, size: int, channels: int) -> None:
        shape = (claims + LENT, max(count, 1), size, size, channels)
        file = os.memfd_create("dfkd-stream", os.MFD_CLOEXEC)
        os.ftruncate(file, int(np.prod(shape)))
        self._open(file, shape)

    def claim(self) -> int:
        """A free slot."""
        return self._free.popleft()

    def release(self, slot: int) -> None:
        """A claimed slot is not wanted after all."""
        self._free.append(slot)

    def images(self, slot: int, count: int) -> Tensor:
        """uint8 `[count, C, S, S]` in a claimed slot, channels last in memory."""
        return torch.from_numpy(self._slots[slot][:count]).permute(0, 3, 1, 2)

    def lend(self, slot: int, count: int, pin: bool) -> Tensor:
        """A claimed slot's images, for as long as anybody wants them; pinned, or beyond `LENT` slots, as a copy."""
        images_NCHW = self.images(slot, count)
        if pin or self._lent >= LENT:
            copy_NCHW = images_NCHW.pin_memory() if pin else images_NCHW.clone()
            self.release(slot)
            return copy_NCHW
        self._lent += 1
        # The tensor keeps this very array alive, and so does every view of the tensor.
        array = self._slots[slot][:count]
        weakref.finalize(array, self._back, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _back(self, slot: int) -> None:
        self._lent -= 1
        self._free.append(slot)

    def _open(self, file: int, shape: tuple[int, ...]) -> None:
        self._file, self._shape = file, shape
        memory = mmap.mmap(file, int(np.prod(shape)))
        self._slots: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._free = deque(range(shape[0]))
        self._lent = 0

    def __getstate__(self) -> dict[str, Any]:
        """Can be sent to a process as it starts, and only then."""
        return {"file": reduction.DupFd(self._file), "shape": self._shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["file"].detach(), state["shape"])

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
