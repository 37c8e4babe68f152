"""The topology with live groups: world, row and column of this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Mesh:
    """Groups as values that are passed, never globals.

    Args:
        topology: the arithmetic behind it.
        rank: this process in the world.
        world: every rank.
        row: the ranks that hold the same teachers.
        column: one rank of each row.
        sync: the group over which a row's batch-coupled terms are global (`row`, or alone with `sync: local`).
        sync_world: the same for the student.
    """

    topology: Topology
    rank: int
    world: Group
    row: Group
    column: Group
    sync: Group
    sync_world: Group

    @property
    def teachers(self) -> tuple[int, ...]:
        """Indices of the teachers that this rank holds."""
        return self.topology.teachers[self.topology.row_of(self.rank)]


def world_group(rank: int, size: int) -> Group:
    """All joined ranks."""
    return Group(tuple(range(size)), rank, dist.group.WORLD) if size > 1 else ALONE


def make_mesh(topology: Topology, device: torch.device, sync: str = "global") -> Mesh:
    """The mesh over the joined ranks; every rank creates every group, in the same order.

    Raises:
        RuntimeError: the joined world has another size than the topology.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size != topology.world_size:
        raise RuntimeError(f"the topology is for {topology.world_size} ranks, but {size} joined")
    if size == 1:
        return Mesh(topology, 0, ALONE, ALONE, ALONE, ALONE, ALONE)
    rank = dist.get_rank()
    grid = torch.arange(size).view(topology.rows, topology.columns)
    mesh = DeviceMesh(device.type, grid, mesh_dim_names=("teacher", "replica"))
    t, r = topology.row_of(rank), topology.column_of(rank)
    world = world_group(rank, size)
    row = Group(topology.row_ranks(t), r, mesh.get_group("replica")) if topology.columns > 1 else ALONE
    column = Group(topology.column_ranks(r), t, mesh.get_group("teacher")) if topology.rows > 1 else ALONE
    shared = sync == "global"
    return Mesh(topology, rank, world, row, column, row if shared else ALONE, world if shared else ALONE)
