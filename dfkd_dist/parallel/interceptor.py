"""Counts what is handed to torch.distributed's collectives, by standing in front of them.

This is the measurement that `dfkd plan`'s arithmetic is held against: it knows nothing of methods or meshes.
"""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

PAYLOAD: dict[str, str | None] = {
    "all_gather_into_tensor": "input_tensor",
    "all_gather": "tensor",
    "all_gather_object": "obj",
    "all_reduce": "tensor",
    "all_to_all_single": "input",
    "all_to_all": "input_tensor_list",
    "barrier": None,
    "broadcast": "tensor",
    "broadcast_object_list": "object_list",
    "gather": "tensor",
    "gather_object": "obj",
    "isend": "tensor",
    "reduce": "tensor",
    "reduce_scatter_tensor": "input",
    "scatter": "scatter_list",
    "send": "tensor",
}
"""Function of torch.distributed to the parameter that holds what this rank hands in."""


@dataclass(frozen=True)
class Count:
    """Calls of one kind of collective, and the bytes handed to them on this rank."""

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.calls + other.calls, self.bytes + other.bytes)


class Interceptor:
    """While it is entered, every call of a collective through `torch.distributed` is counted.

    Bytes are the input payload: a rank's own tensor in an all-gather, the whole tensor in an all-reduce or broadcast
    (on every member), all pieces of an all-to-all including the one that stays. What crosses wires depends on the
    backend's algorithm and is not seen here. Python objects count with their pickled length. Calls that bypass the
    module's attributes (DistributedDataParallel's C++ reducer) are not seen. Not for use from several threads.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Self:
        for name, parameter in PAYLOAD.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name, parameter, self._originals[name]))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals = {}

    def take(self) -> dict[str, Count]:
        """Counts since the last call, by the collective's name; starts anew."""
        taken, self.counts = self.counts, {}
        return taken

    def _counting(self, name: str, parameter: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            size = payload_bytes(given.get(parameter)) if parameter is not None else 0
            self.counts[name] = self.counts.get(name, Count()) + Count(1, size)
            return original(*args, **kwargs)

        return counted


def payload_bytes(value: Any) -> int:
    """Bytes of a tensor, of a list of tensors, or of a pickled object; None is nothing."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        return sum(payload_bytes(item) for item in value)
    return len(pickle.dumps(value))
