"""Images made round by round for each teacher and kept in a pool, from which the student learns.

DeepInversion, CMI, Fast: a way to make images is a `Synthesiser`; this source names none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import ASSISTANT, HARVEST, AugmentSpec, InversionSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pixels import to_image_space, to_uint8
from dfkd_dist.data.pool import Made, Pool
from dfkd_dist.data.pool_shards import Piece
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.assistants import PoolAssistants
from dfkd_dist.sources.pool_order import PoolOrder
from dfkd_dist.sources.synthesis.base import Synthesiser

POOL = "pool"
"""Its part of a checkpoint; each synthesis has one of its own."""


class InversionSource:
    """One synthesis for each of this rank's teachers, and the pool.

    A round is the iterations of the synthesis, one step in which its images go to the pool (`harvest`), and the
    student's steps, which take images of the whole pool.

    Args:
        spec: the recipe's section.
        batch: images of a student step.
        synthesisers: one for each of this rank's teachers, in recipe order, with as many steps each.
        pool: the same on every rank.
        mesh: groups.
        exchange: has every teacher answer for every rank's images.
        randomness: counter-based.
        augment_spec: how images are augmented for the student.
        dtype: of images.
        device: where they go.
        assistants: what the adversary plays against in the student's place, or None; they learn after the harvest.
    """

    def __init__(
        self,
        spec: InversionSpec,
        batch: int,
        synthesisers: Sequence[Synthesiser],
        pool: Pool,
        mesh: Mesh,
        exchange: Exchange,
        randomness: Randomness,
        augment_spec: AugmentSpec,
        dtype: torch.dtype,
        device: torch.device,
        assistants: PoolAssistants | None = None,
    ) -> None:
        self.spec, self.size, self.synthesisers, self.pool = spec, batch, list(synthesisers), pool
        self.mesh, self.exchange, self.randomness = mesh, exchange, randomness
        self.augment_spec, self.dtype, self.device = augment_spec, dtype, device
        self.per_teacher = spec.per_round(batch)
        self.assistants = assistants
        self.players = [player for synthesiser in self.synthesisers for player in synthesiser.players]
        self.players += assistants.players if assistants is not None else []
        self._order = PoolOrder(randomness, POOL)

    # -------------------------------------------------------------------------------------- inner steps

    def update_steps(self, round: int) -> int:
        """The iterations of the synthesis, the harvest, and in main rounds the assistants' steps."""
        warm = round < self.synthesisers[0].bench.warmup
        return self._iterations(round) + 1 + (0 if warm or self.assistants is None else self.assistants.steps)

    def _iterations(self, round: int) -> int:
        return self.synthesisers[0].steps(round)

    def update_phase(self, round: int, step: int) -> str:
        """A phase of the synthesis, `harvest` or `assistant`."""
        if step > self._iterations(round):
            return ASSISTANT
        return HARVEST if step == self._iterations(round) else self.synthesisers[0].phase(round, step)

    def update_images(self, round: int, step: int) -> int:
        """A round's images, of all teachers; or those of an assistant's step."""
        each = self.size if step > self._iterations(round) else self.per_teacher
        return each * len(self.exchange.shapes)

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One iteration for each of this rank's teachers, or the harvest, or a step of their assistants."""
        after = step - self._iterations(round)
        if after == 0:
            self._harvest(round, student)
        if after > 0 and self.assistants is not None:
            yield from self.assistants.update(round, after - 1)
        if after >= 0:
            return
        for synthesiser in self.synthesisers:
            yield from synthesiser.step(round, step, student, observe)

    # ------------------------------------------------------------------------------------------- harvest

    def _harvest(self, round: int, student: ImageNetwork) -> None:
        """This round's images of all teachers into every rank's pool, in the order (teacher, index)."""
        taken = [synthesiser.harvest(round, student) for synthesiser in self.synthesisers]
        images_NCHW = torch.cat([to_uint8(images) for images, _ in taken])
        labels_N = torch.cat([labels for _, labels in taken])
        logits_NKC = self._answers(images_NCHW) if self.spec.pool.targets == "stored" else None
        self.pool.add(
            Made(
                self._gathered(images_NCHW),
                self._gathered(labels_N),
                self._origins(),
                None if logits_NKC is None else self._gathered(logits_NKC),
            )
        )
        if self.pool.full_shards:
            self.pool.take_up(self._write())

    def _answers(self, images_NCHW: Tensor) -> Tensor:
        """Every teacher's logits `[N, K, C]` about the images as the pool keeps them."""
        whole_NCHW = to_image_space(images_NCHW, self.dtype)
        count = self.per_teacher * len(self.exchange.shapes)
        batch = self.exchange.own(whole_NCHW, self._padded, count)
        return torch.stack([said.logits_NC.to(self.dtype) for said in self.exchange.answers(batch)], dim=1)

    @property
    def _padded(self) -> int:
        """The largest number of images that a rank makes in a round."""
        topology = self.mesh.topology
        return max(len(held) for held in topology.teachers) * -(-self.per_teacher // topology.columns)

    def _gathered(self, own: Tensor) -> Tensor:
        """What all ranks have of a round's images, in the order (teacher, index)."""
        topology, world = self.mesh.topology, self.mesh.world
        block = torch.cat([own, own.new_zeros(self._padded - len(own), *own.shape[1:])])
        blocks = world.gather(block)
        parts: dict[tuple[int, int], Tensor] = {}
        for rank, block in enumerate(blocks):
            column, start = topology.column_of(rank), 0
            low, high = bounds(self.per_teacher, topology.columns, column)
            for k in topology.teachers[topology.row_of(rank)]:
                parts[k, column] = block[start : start + high - low]
                start += high - low
        return torch.cat([parts[place] for place in sorted(parts)])

    def _origins(self) -> Tensor:
        """The teacher of each image of a round."""
        return torch.arange(len(self.exchange.shapes)).repeat_interleave(self.per_teacher)

    # ---------------------------------------------------------------------------------- student's images

    def student_steps(self, round: int) -> int:
        """Never asked for: the recipe says how many."""
        raise NotImplementedError("rounds.student_steps must be a number for an inversion source")

    def batch(self, round: int, step: int) -> Batch:
        """This rank's images of a global batch, and the teachers' answers where they are kept."""
        made, slots_n = self.pool.read(self._ids(round, step)), self._slots().to(self.device)
        images_NCHW = self._augmented(to_image_space(made.images_NCHW, self.dtype), slots_n, round, step)
        if not self.pool.in_memory:
            self.pool.will_read(self._ids(round, step + 1))
        if made.logits_NKC is None:
            batch = self.exchange.own(images_NCHW, -(-self.size // self.mesh.world.size), self.size)
        else:
            said = [Signals(logits_NC) for logits_NC in made.logits_NKC.to(self.dtype).unbind(dim=1)]
            batch = Batch(images_NCHW, self.size, said=tuple(said))
        ids_n = self._ids(round, step).to(self.device)
        return replace(batch, labels_N=made.labels_N, ids_N=ids_n, slots_N=slots_n, at=(round, step))

    def _slots(self) -> Tensor:
        """This rank's places in the global batch, on the CPU."""
        world = self.mesh.world
        return torch.arange(*bounds(self.size, world.size, world.rank), device="cpu")

    def _ids(self, round: int, step: int) -> Tensor:
        """Images in this rank's slots: a round goes through the pool in orders that it shares with no other round.

        A function of (seed, round, step, slot) and the pool's size.
        """
        return self._order.at(step * self.size + self._slots(), len(self.pool), round)

    def _augmented(self, images_NCHW: Tensor, slots_n: Tensor, round: int, step: int) -> Tensor:
        wanted = num_uniforms(self.augment_spec)
        if not wanted:
            return images_NCHW
        uniforms_NP = self.randomness.uniform(
            "augment/pool", slots_n, (wanted,), round=round, step=step, dtype=self.dtype
        )
        return augment(images_NCHW, uniforms_NP, self.augment_spec)

    def newest(self, teacher: int, count: int) -> Tensor:
        """The newest `count` images in the pool that were made for a teacher, in image space."""
        ids_n = (self.pool.fact("teachers_N") == teacher).nonzero().flatten()[-count:]
        return to_image_space(self.pool.read(ids_n).images_NCHW, self.dtype)

    # ----------------------------------------------------------------------------------------- state

    def close(self) -> None:
        """End the reading ahead."""
        self.pool.close()

    def state_dict(self) -> dict[str, Any]:
        """The pool by reference, and what each synthesis must keep."""
        state = {_part(s): s.state_dict() for s in self.synthesisers}
        kept = {part: of_synthesis for part, of_synthesis in state.items() if of_synthesis}
        return kept | ({POOL: self.pool.state_dict()} if self.mesh.rank == 0 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.pool.load_state_dict(state[POOL], check=self.mesh.rank == 0)
        for synthesiser in self.synthesisers:
            if _part(synthesiser) in state:
                synthesiser.load_state_dict(state[_part(synthesiser)])

    def _write(self) -> list[Piece]:
        """Full shards, written on rank 0; what it wrote, or why it could not, is told to everybody."""
        outcome: tuple[list[Piece], DatasetError | None] = ([], None)
        if self.mesh.rank == 0:
            try:
                outcome = (self.pool.write(), None)
            except DatasetError as error:  # it must reach the others, who are waiting
                outcome = ([], error)
        pieces, failure = self.mesh.world.gather_objects(outcome)[0]
        if failure is not None:
            raise failure
        return pieces


def _part(synthesiser: Synthesiser) -> str:
    return f"synthesis/{synthesiser.bench.name}"
