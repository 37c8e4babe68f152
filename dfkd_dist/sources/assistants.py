"""Assistants that learn from the pool: what DFMF's `CMI (w/ GA)` has the adversary play against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.data.pixels import to_image_space
from dfkd_dist.data.pool import Pool
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.signals import Batch
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.base import Side
from dfkd_dist.sources.pool_order import PoolOrder
from dfkd_dist.sources.synthesis.base import Autocast


@dataclass(frozen=True)
class Pupil:
    """One teacher's assistant.

    Args:
        place: which teacher of the recipe.
        answering: the teacher's fast copy.
        player: over the assistant with its objective; its group is the row.
    """

    place: int
    answering: Teacher
    player: Player

    @property
    def side(self) -> Side:
        """The assistant with its objective."""
        return cast(Side, self.player.module)


class PoolAssistants:
    """One assistant for each of this rank's teachers; each learns from the images that were made for its teacher.

    Args:
        pupils: of this rank's teachers.
        steps: of a round, after the harvest.
        pool: where the images are: in each round `per_round` of the first teacher, then of the second, and so on.
        per_round: images of a round for each teacher.
        teachers: of the run.
        batch: images of a step, over the row.
        mesh: groups.
        randomness: counter-based.
        augment_spec: how images are augmented, as for the student.
        dtype: of images.
        device: where they go.
        autocast: the number format of trained networks.
    """

    def __init__(
        self,
        pupils: Sequence[Pupil],
        steps: int,
        pool: Pool,
        per_round: int,
        teachers: int,
        batch: int,
        mesh: Mesh,
        randomness: Randomness,
        augment_spec: AugmentSpec,
        dtype: torch.dtype,
        device: torch.device,
        autocast: Autocast = nullcontext,
    ) -> None:
        self.pupils, self.steps, self.pool = list(pupils), steps, pool
        self.per_round, self.teachers, self.size = per_round, teachers, batch
        self.mesh, self.randomness, self.augment_spec = mesh, randomness, augment_spec
        self.dtype, self.device, self.autocast = dtype, device, autocast
        self._orders = [PoolOrder(randomness, "pool/assistant", pupil.answering.name) for pupil in self.pupils]

    @property
    def players(self) -> list[Player]:
        """The assistants."""
        return [pupil.player for pupil in self.pupils]

    def update(self, round: int, step: int) -> Iterator[tuple[Player, Losses]]:
        """One step of each."""
        for pupil, order in zip(self.pupils, self._orders, strict=True):
            images_NCHW = self._images(pupil, order, round, step)
            with torch.no_grad():
                answer = pupil.answering(images_NCHW, pupil.side.need)
            with self.autocast():
                yield pupil.player, pupil.side(Batch(images_NCHW, self.size), [answer])

    def _images(self, pupil: Pupil, order: PoolOrder, round: int, step: int) -> Tensor:
        """This rank's slice of an augmented batch of the teacher's images."""
        low, high = bounds(self.size, self.mesh.row.size, self.mesh.row.rank)
        own = torch.arange(low, high, device="cpu")
        numbers_n = order.at(step * self.size + own, len(self.pool) // self.teachers, round)
        made = self.pool.read(self._ids(pupil.place, numbers_n))
        images_NCHW, wanted = to_image_space(made.images_NCHW, self.dtype), num_uniforms(self.augment_spec)
        if not wanted:
            return images_NCHW
        uniforms_NP = self.randomness.uniform(
            "augment/assistant", own.to(self.device), (wanted,), owner=pupil.answering.name, round=round, step=step,
            dtype=self.dtype,
        )  # fmt: skip
        return augment(images_NCHW, uniforms_NP, self.augment_spec)

    def _ids(self, place: int, numbers_n: Tensor) -> Tensor:
        """Numbers in the pool of a teacher's first, second, ... image."""
        rounds_n, index_n = numbers_n // self.per_round, numbers_n % self.per_round
        return (rounds_n * self.teachers + place) * self.per_round + index_n
