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

from dfkd_dist.models.signals import Batch, Need, Signals
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.topology import Topology, bounds, share

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

    def slots(self) -> list[int]:
        """For each position in (teacher, index) order, its place among all columns' images: the same on any mesh."""
        first = bounds(self.per_teacher, self.topology.columns, self.column)[0]
        held = sorted(k for teachers in self.topology.teachers for k in teachers)
        return [k * self.per_teacher + first + n for k in held for n in range(self.made(k))]

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
        self.shapes = [{name: of[name] for name in sorted(of) if name in need} for of in shapes]
        self._plans: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def own(self, images_NCHW: Tensor, padded: int, count: int) -> Batch:
        """A batch of images that each rank brings itself and trains on itself (a stream that is spread over the world).

        Args:
            images_NCHW: this rank's, at most `padded` of them, perhaps none.
            padded: the same number on all ranks of the column; blocks are filled up with zeros to this length, and
                teachers answer block by block, so that their numbers do not depend on the ranks.
            count: valid images over all ranks.

        Raises:
            ValueError: more images than `padded`.
        """
        missing = padded - len(images_NCHW)
        if missing < 0:
            raise ValueError(f"{len(images_NCHW)} images do not fit in a block of {padded}")
        block = images_NCHW
        if missing:
            block = torch.cat([block, block.new_zeros(missing, *block.shape[1:])])
        return Batch(images_NCHW, count, torch.cat(self.mesh.column.gather(block)), block=padded)

    def gather(self, own: Sequence[Tensor], per_teacher: int) -> Batch:
        """The student's batch from what each rank made.

        Args:
            own: images `[n, C, H, W]` for each of this rank's teachers, in recipe order.
            per_teacher: images of each generator over its whole row (b).
        """
        column, block = self.mesh.column, torch.cat(list(own))
        deal = Deal(self.mesh.topology, self.mesh.topology.column_of(self.mesh.rank), per_teacher)
        order, slots = self._plan(deal, block.device)
        if column.size > 1:
            padding = block.new_zeros(deal.padded - len(block), *block.shape[1:])
            block = torch.cat(column.gather(torch.cat([block, padding])))[order]
        mine = slice(column.rank, None, column.size)
        return Batch(block[mine], per_teacher * len(self.shapes), block, slots_N=slots[mine])

    def _plan(self, deal: Deal, device: torch.device) -> tuple[Tensor, Tensor]:
        """Order and slots of a column's images; kept, because a copy to the device waits for it."""
        key = deal.per_teacher, device
        if key not in self._plans:
            order, slots = (torch.tensor(part, dtype=torch.long) for part in (deal.order(), deal.slots()))
            self._plans[key] = order.to(device), slots.to(device)
        return self._plans[key]

    def answers(self, batch: Batch) -> list[Signals]:
        """Every teacher's signals about this rank's images, in recipe order; empty where there are no teachers."""
        if batch.sections:
            parts = [self.answers(section) for section in batch.sections]
            return [Signals.joined(said) for said in zip(*parts, strict=True)]
        if batch.said:
            return list(batch.said)
        if batch.column_NCHW is None:
            return []
        column_NCHW = batch.column_NCHW
        with torch.no_grad():
            said = [self._ask(teacher, column_NCHW, batch.block) for teacher in self.teachers]
        if self.mesh.column.size > 1:
            said = self._send_home(said, self._homes(len(column_NCHW), batch.block), batch.images_NCHW.dtype)
        wanted = len(batch.images_NCHW)
        return said if len(said[0].logits_NC) == wanted else [signals.part(0, wanted) for signals in said]

    def _ask(self, teacher: Callable[[Tensor, Need], Signals], column_NCHW: Tensor, block: int | None) -> Signals:
        if block is None or len(column_NCHW) == block:
            return teacher(column_NCHW, self.need)
        return Signals.joined([teacher(part, self.need) for part in column_NCHW.split(block)])

    def _homes(self, total: int, block: int | None) -> list[slice]:
        """For each row, which of the column's images its rank trains on."""
        rows = self.mesh.column.size
        if block is None:
            return [slice(row, total, rows) for row in range(rows)]
        return [slice(row * block, (row + 1) * block) for row in range(rows)]

    def _send_home(self, said: Sequence[Signals], homes: Sequence[slice], dtype: torch.dtype) -> list[Signals]:
        mine, held = self.mesh.column.rank, self.mesh.topology.teachers
        own = held[mine]
        packed = [_pack(signals, self.shapes[k]).to(dtype) for k, signals in zip(own, said, strict=True)]
        pieces = [torch.cat([p[home].reshape(-1) for p in packed]) for home in homes]
        total = len(said[0].logits_NC)
        count = len(range(total)[homes[mine]])
        lengths = [[count * self.width(k) for k in held[row]] for row in range(len(homes))]
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


def _pack(signals: Signals, shapes: Shapes) -> Tensor:
    return torch.cat([signals.tensor(name).flatten(1) for name in shapes], dim=1)


def _unpack(packed_NF: Tensor, shapes: Shapes) -> Signals:
    parts = packed_NF.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return Signals.of({name: p.unflatten(1, shape) for (name, shape), p in zip(shapes.items(), parts, strict=True)})
