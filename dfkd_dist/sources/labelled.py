"""Real labelled images: private teachers and the gold standard are trained by the same loop as everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.augment import augment, augment_labels, num_uniforms, windows
from dfkd_dist.data.datasets import ImageSet, to_image_space
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds


class LabelledSource:
    """Mini-batches of a labelled set; round r is global batch r of an endless sequence of epochs.

    An epoch is a permutation keyed by (seed, epoch); its tail below one batch is dropped, so steps are of equal size.

    Args:
        images: the set.
        indices: which of its images (a party's share).
        batch: images of a step over all ranks; more than there are is an error.
        world: the ranks that share a step.
        randomness: counter-based.
        augment_spec: per-sample augmentation.
        dtype: of the images.
        device: where they go.
        exchange: has the teachers answer, where there are any (distillation on the original data).
        crop: side of the random windows that are taken of the images; None takes them whole.

    Raises:
        ValueError: fewer images than one batch.
    """

    players: Sequence[Player] = ()

    def __init__(
        self,
        images: ImageSet,
        indices: Tensor,
        batch: int,
        world: Group,
        randomness: Randomness,
        augment_spec: AugmentSpec,
        dtype: torch.dtype,
        device: torch.device,
        exchange: Exchange | None = None,
        crop: int | None = None,
    ) -> None:
        if len(indices) < batch:
            raise ValueError(f"batch is {batch}, but the training share has only {len(indices)} images")
        self.images, self.indices, self.size, self.world = images, indices, batch, world
        self.randomness, self.augment_spec, self.dtype, self.device = randomness, augment_spec, dtype, device
        self.exchange, self.crop = exchange, crop
        self.per_epoch = len(indices) // batch
        self._order: tuple[int, Tensor] = (-1, indices)

    def update_steps(self, round: int) -> int:
        """Nothing is made."""
        return 0

    def update_phase(self, round: int, step: int) -> str:
        """Never asked for."""
        raise NotImplementedError("a labelled source has no inner steps")

    def update_images(self, round: int, step: int) -> int:
        """None are made."""
        return 0

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """Never asked for."""
        raise NotImplementedError("a labelled source has no inner steps")

    def batch(self, round: int, step: int) -> Batch:
        """This rank's slice of global batch `round`."""
        epoch, g = divmod(round, self.per_epoch)
        low, high = bounds(self.size, self.world.size, self.world.rank)
        chosen = self._shuffled(epoch)[g * self.size + low : g * self.size + high]
        images_NCHW = to_image_space(self.images.images(chosen).to(self.device), self.dtype)
        labels_N = self.images.labels(chosen).to(self.device)
        slots = torch.arange(low, high, device=self.device)
        if self.crop is not None:
            places_N2 = self.randomness.uniform("crop/labelled", slots, (2,), round=round, dtype=torch.float64)
            images_NCHW = windows(images_NCHW, places_N2, self.crop)
            if self.images.of_pixels:
                labels_N = windows(labels_N.unsqueeze(1), places_N2, self.crop).squeeze(1)
        wanted = num_uniforms(self.augment_spec)
        if wanted:
            uniforms_NP = self.randomness.uniform("augment/labelled", slots, (wanted,), round=round, dtype=self.dtype)
            images_NCHW = augment(images_NCHW, uniforms_NP, self.augment_spec)
            if self.images.of_pixels:
                labels_N = augment_labels(labels_N, uniforms_NP, self.augment_spec)
        batch = Batch(images_NCHW, self.size)
        if self.exchange is not None:
            batch = self.exchange.own(images_NCHW, -(-self.size // self.world.size), self.size)
        return replace(batch, labels_N=labels_N, ids_N=chosen.to(self.device), slots_N=slots, at=(round, step))

    def _shuffled(self, epoch: int) -> Tensor:
        """The share's positions in the order of an epoch; the last epoch's is kept."""
        if self._order[0] != epoch:
            order_N = self.randomness.permutation("epoch", len(self.indices), round=epoch)
            self._order = epoch, self.indices[order_N]
        return self._order[1]

    def student_steps(self, round: int) -> int:
        """One: a round is a step."""
        return 1

    def close(self) -> None:
        """Nothing reads ahead."""

    def state_dict(self) -> dict[str, Any]:
        """The order is a function of (seed, epoch): nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""
