"""A group of ranks as a value: its collectives, correct without any process group when it has one member."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 prefers another name for it, which torch 2.11 does not know.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other.

    Args:
        ranks: their world ranks, in the group's order.
        rank: this process's place in `ranks`.
        handle: the process group, or None for a group of one.
    """

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    handle: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def device_type(self) -> str:
        """Where its collectives want their tensors: `cuda` with NCCL, else `cpu`."""
        return "cuda" if dist.get_backend(self.handle) == "nccl" else "cpu"

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every member's tensor (equal shapes), in the group's order."""
        if self.size == 1:
            return [tensor]
        flat = tensor.detach().contiguous().view(-1)
        out = flat.new_empty(self.size * flat.numel())
        dist.all_gather_into_tensor(out, flat, group=self.handle)
        return [part.view(tensor.shape) for part in out.chunk(self.size)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the members, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.handle)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Maximum over the members, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.handle)
        return tensor

    def all_to_all(self, pieces: Sequence[Tensor], receive: Sequence[int]) -> list[Tensor]:
        """Send `pieces[i]` (1-D) to member i; returns what each member sent here, `receive[i]` elements long."""
        if self.size == 1:
            return [pieces[0]]
        sent = torch.cat([p.reshape(-1) for p in pieces])
        out = sent.new_empty(sum(receive))
        dist.all_to_all_single(out, sent, list(receive), [p.numel() for p in pieces], group=self.handle)
        return list(out.split(list(receive)))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every member's Python object; for set-up and checkpoints, not for steps."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.handle)
        return out


ALONE = Group()
"""The group of a process that shares nothing."""
