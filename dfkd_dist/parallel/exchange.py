"""One exchange out (images), one back (answers), over a column of the mesh.

The target needs every teacher on every image (DFMF Eq. 1). Each rank makes images with its row's generators; the column
gathers them; every rank runs its own teachers on all of them; answers travel to where they are used. Position j of the
column's images, ordered by (teacher, index), is dealt to the student of row j mod T: a balanced mixture on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd_dist.models.signals import FEATURES, LOGITS, MAP, Batch, Need, Signals
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.topology import Topology, share

Shapes = Mapping[str, tuple[int, ...]]
"""Signal name to its shape without the batch dimension."""


@dataclass(frozen=True)
class Deal:
    """Who has which images of one column on a student step; plain integers.

    Args:
        topology: the mesh.
        column: which column.
        per_teacher: images each generator makes over its whole row (b).
    """

    topology: Topology
    column: int
    per_teacher: int

    def made(self, teacher: int) -> int:
        """Images that this column's rank of the teacher's row makes with its generator."""
        return share(self.per_teacher, self.topology.columns, self.column)

    def row_total(self, row: int) -> int:
        """Images made by this column's rank in `row`."""
        return sum(self.made(k) for k in self.topology.teachers[row])

    @property
    def total(self) -> int:
        """Images in the column."""
        return sum(self.row_total(t) for t in range(self.topology.rows))

    @property
    def padded(self) -> int:
        """Length of a rank's block in the gather (rows may hold unequal numbers of teachers)."""
        return max(self.row_total(t) for t in range(self.topology.rows))

    def order(self) -> list[int]:
        """For each position in (teacher, index) order, its place in the gathered blocks."""
        start: dict[int, int] = {}
        for row, teachers in enumerate(self.topology.teachers):
            offset = row * self.padded
            for k in teachers:
                start[k] = offset
                offset += self.made(k)
        return [start[k] + n for k in sorted(start) for n in range(self.made(k))]

    def dealt(self, row: int) -> int:
        """How many of the column's images row `row`'s student gets."""
        return len(range(row, self.total, self.topology.rows))


class Exchange:
    """Images out and answers back for the student's step.

    Args:
        mesh: groups and topology.
        teachers: this rank's teachers, in recipe order.
        shapes: for every teacher of the run (recipe order), the shapes of the signals that travel.
        need: which signals the objective wants.
    """

    def __init__(
        self, mesh: Mesh, teachers: Sequence[Callable[[Tensor, Need], Signals]], shapes: Sequence[Shapes], need: Need
    ) -> None:
        self.mesh, self.teachers, self.need = mesh, teachers, need
        self.shapes = [{name: s for name, s in of.items() if name in need} for of in shapes]
        self._orders: dict[tuple[int, torch.device], Tensor] = {}

    def gather(self, own: Sequence[Tensor], per_teacher: int) -> Batch:
        """The student's batch from what each rank made.

        Args:
            own: images `[n, C, H, W]` for each of this rank's teachers, in recipe order.
            per_teacher: images of each generator over its whole row (b).
        """
        column_NCHW = self._gather_images(own, per_teacher)
        share_NCHW = column_NCHW[self.mesh.column.rank :: self.mesh.column.size]
        return Batch(share_NCHW, per_teacher * len(self.shapes), column_NCHW)

    def _gather_images(self, own: Sequence[Tensor], per_teacher: int) -> Tensor:
        """The column's images `[total, C, H, W]` in (teacher, index) order."""
        column, block = self.mesh.column, torch.cat(list(own))
        if column.size == 1:
            return block
        deal = Deal(self.mesh.topology, self.mesh.topology.column_of(self.mesh.rank), per_teacher)
        padding = block.new_zeros(deal.padded - len(block), *block.shape[1:])
        blocks = torch.cat(column.gather(torch.cat([block, padding])))
        key = per_teacher, block.device
        if key not in self._orders:  # kept, because a copy to the device waits for it
            self._orders[key] = torch.tensor(deal.order(), dtype=torch.long, device=block.device)
        return blocks[self._orders[key]]

    def answers(self, batch: Batch) -> list[Signals]:
        """Every teacher's signals about this rank's images, in recipe order; empty where there are no teachers."""
        if batch.column_NCHW is None:
            return []
        with torch.no_grad():
            said = [teacher(batch.column_NCHW, self.need) for teacher in self.teachers]
        if self.mesh.column.size == 1:
            return said
        return self._send_home(said, len(batch.column_NCHW), batch.images_NCHW.dtype)

    def _send_home(self, said: Sequence[Signals], total: int, dtype: torch.dtype) -> list[Signals]:
        rows, mine, held = self.mesh.column.size, self.mesh.column.rank, self.mesh.topology.teachers
        packed = [_pack(signals, self.need).to(dtype) for signals in said]
        pieces = [torch.cat([p[row::rows].reshape(-1) for p in packed]) for row in range(rows)]
        count = len(range(mine, total, rows))
        lengths = [[count * self.width(k) for k in held[row]] for row in range(rows)]
        received = self.mesh.column.all_to_all(pieces, [sum(row) for row in lengths])
        answers: dict[int, Signals] = {}
        for row, flat in enumerate(received):
            parts = zip(held[row], flat.split(lengths[row]), strict=True)
            # A rank may have no image at all, so no length is left to be inferred.
            answers |= {k: _unpack(part.view(count, self.width(k)), self.shapes[k]) for k, part in parts}
        return [answers[k] for k in sorted(answers)]

    def width(self, teacher: int) -> int:
        """Numbers per image in one teacher's answer."""
        return sum(math.prod(shape) for shape in self.shapes[teacher].values())


_FIELDS = {LOGITS: "logits_NC", FEATURES: "features_ND", MAP: "map_NDHW"}


def _pack(signals: Signals, need: Need) -> Tensor:
    parts = [getattr(signals, attribute) for name, attribute in _FIELDS.items() if name in need]
    return torch.cat([p.flatten(1) for p in parts], dim=1)


def _unpack(packed_NF: Tensor, shapes: Shapes) -> Signals:
    present = [name for name in _FIELDS if name in shapes]
    parts = packed_NF.split([math.prod(shapes[name]) for name in present], dim=1)
    found = {_FIELDS[n]: p.unflatten(1, shapes[n]) for n, p in zip(present, parts, strict=True)}
    return Signals(**found)
