"""Memory as the sum of the bytes of all live tensors, on any device and without asking an allocator.

Every storage counts once, however many views it has, from the operation that made it until its last owner is gone
(autograd's saved tensors are owners). A caching allocator, such as CUDA's, rounds sizes up, keeps freed blocks and
fragments, and kernels take workspaces that are no tensors; so a device needs somewhat more than is counted here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Holder = Tensor | nn.Module | torch.optim.Optimizer | Iterable["Holder"]
"""Something that keeps tensors alive."""


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows the storages that operations make. `current` and `peak` are in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused = False

    def adopt(self, *holders: Holder) -> int:
        """Count tensors that exist already: parameters, buffers, gradients, optimiser state. Returns the new bytes."""
        before = self.current
        for holder in holders:
            for tensor in tensors_of(holder):
                self._see(tensor)
        return self.current - before

    def reset_peak(self) -> None:
        """The peak starts anew, from what is alive."""
        self.peak = self.current

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Storages made inside are not counted (and those freed inside are still given back)."""
        was, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = was

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.current -= size
            del self._known[key]

        # The Python object of a storage lives as long as the storage itself, also where only C++ still owns it.
        self._known[key] = weakref.ref(storage, gone)
        self.current += size
        self.peak = max(self.peak, self.current)


def tensors_of(holder: Holder) -> Iterator[Tensor]:
    """The tensors that a module (with gradients), an optimiser or a collection of them keeps."""
    match holder:
        case Tensor():
            yield holder
        case nn.Module():
            yield from holder.parameters()
            yield from holder.buffers()
            yield from (p.grad for p in holder.parameters() if p.grad is not None)
        case torch.optim.Optimizer():
            yield from (leaf for leaf in tree_leaves(dict(holder.state)) if isinstance(leaf, Tensor))
        case Mapping():
            yield from tensors_of(holder.values())
        case _:
            for item in holder:
                yield from tensors_of(item)


def storage_bytes(*holders: Holder) -> int:
    """Bytes of the distinct storages behind the tensors of some holders."""
    storages = [tensor.untyped_storage() for holder in holders for tensor in tensors_of(holder)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
