"""A stand-in for the joined ranks: collectives that return tensors of the right shape and talk to nobody.

With it the real code runs as any rank of any mesh in one process, on tensors without data (device `meta`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.interceptor import payload_bytes
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Sent:
    """What was handed to one collective: its name in torch.distributed, the bytes, and among whom."""

    kind: str
    bytes: int
    group: str
    members: int


Record = Callable[[Sent], None]
"""Told of every collective."""


def _ignore(sent: Sent) -> None:
    pass


@dataclass(frozen=True)
class DryGroup(Group):
    """A group whose other members are imagined; the values that it returns mean nothing.

    Args:
        name: `row`, `column` or `world`.
        objects: what `gather_objects` returns (one per member), or empty for copies of the own value.
        record: told of every collective.
    """

    name: str = ""
    objects: tuple[Any, ...] = ()
    record: Record = _ignore

    def _note(self, kind: str, tensor: Tensor) -> None:
        self.record(Sent(kind, payload_bytes(tensor), self.name, self.size))

    @property
    def device_type(self) -> str:
        """There is no backend."""
        return "cpu"

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One part of a buffer for all members, as often as there are members."""
        if self.size == 1:
            return [tensor]
        flat = tensor.detach().contiguous().view(-1)
        self._note("all_gather_into_tensor", flat)
        out = flat.new_empty(self.size * flat.numel())
        # The same view for all: a thousand views of a thousand ranks would cost seconds and say no more.
        return [out[: flat.numel()].view(tensor.shape)] * self.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return self._reduced(tensor)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return self._reduced(tensor)

    def _reduced(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            self._note("all_reduce", tensor)
        return tensor

    def all_to_all(self, pieces: Sequence[Tensor], receive: Sequence[int]) -> list[Tensor]:
        """Empty pieces of the lengths to be received."""
        if self.size == 1:
            return [pieces[0]]
        sent = torch.cat([p.reshape(-1) for p in pieces])
        self._note("all_to_all_single", sent)
        return list(sent.new_empty(sum(receive)).split(list(receive)))

    def gather_objects(self, value: Any) -> list[Any]:
        """`objects`, or copies of the own value."""
        return list(self.objects) or [value] * self.size


def dry_mesh(
    topology: Topology, rank: int, sync: str = "global", column_objects: Sequence[Any] = (), record: Record = _ignore
) -> Mesh:
    """The mesh as `rank` would see it.

    Args:
        topology: of the imagined world.
        rank: who this process is.
        sync: `global` or `local`, as in `make_mesh`.
        column_objects: what the members of the rank's column say when objects are gathered, by row.
        record: told of every collective.
    """
    t, r = topology.row_of(rank), topology.column_of(rank)

    def group(name: str, ranks: Sequence[int], place: int, objects: Sequence[Any] = ()) -> Group:
        return DryGroup(tuple(ranks), place, None, name, tuple(objects), record) if len(ranks) > 1 else ALONE

    world = group("world", range(topology.world_size), rank)
    row = group("row", topology.row_ranks(t), r)
    column = group("column", topology.column_ranks(r), t, column_objects)
    shared = sync == "global"
    return Mesh(topology, rank, world, row, column, row if shared else ALONE, world if shared else ALONE)
