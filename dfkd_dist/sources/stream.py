"""Real images streamed from shards, selected by the teachers and the student: DFND, KD3, plain distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.data.datasets import to_image_space
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.stream import RawBatch, Stream
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.selection import Selector
from dfkd_dist.sources.views import ViewMaker


class StreamReader:
    """This group's global batches of a stream, as images on the device: bad samples left out, the others augmented.

    Args:
        stream: told this rank and the size of `group`.
        batch: slots of a global batch.
        group: the ranks that share a global batch.
        randomness: counter-based; augmentation is keyed by (round, step, slot).
        augment_spec: per-sample augmentation; null reads images as they are.
        dtype: of the images.
        device: where they go.
    """

    def __init__(
        self,
        stream: Stream,
        batch: int,
        group: Group,
        randomness: Randomness,
        augment_spec: AugmentSpec | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stream, self.size, self.group, self.randomness = stream, batch, group, randomness
        self.augment_spec, self.dtype, self.device = augment_spec, dtype, device

    @property
    def padded(self) -> int:
        """The largest number of slots that a rank has."""
        return -(-self.size // self.group.size)

    def read(self, epoch: int, g: int, round: int, step: int) -> Batch:
        """Global batch `g` of an epoch: this rank's valid images, and how many there are in all.

        Raises:
            DatasetError: on all ranks, where one of them cannot go on reading, or no image is valid.
        """
        raw, count = self._agreed(epoch, g)
        valid_n = raw.valid_N
        slots_n = raw.slots_N[valid_n].to(self.device)
        images_NCHW = to_image_space(raw.images_NCHW[valid_n].to(self.device, non_blocking=True), self.dtype)
        images_NCHW = self._augmented(images_NCHW, slots_n, round, step)
        labels_n, ids_n = raw.labels_N[valid_n].to(self.device), raw.ids_N[valid_n].to(self.device)
        return Batch(images_NCHW, count, labels_N=labels_n, ids_N=ids_n, slots_N=slots_n, at=(round, step))

    def _agreed(self, epoch: int, g: int) -> tuple[RawBatch, int]:
        """The slots, and the number of valid ones over the group; a rank that fails lets the others know."""
        raw: RawBatch | None = None
        failure: Exception | None = None
        try:
            raw = self.stream.get(epoch, g)
        except (DatasetError, OSError, RuntimeError) as error:  # the others wait for this rank's count
            failure = error
        count, failed = 0 if raw is None else int(raw.valid_N.sum()), int(raw is None)
        if self.group.size > 1:
            told = torch.tensor([count, failed], device=self.group.device_type)
            count, failed = self.group.sum_(told).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise DatasetError(f"epoch {epoch}, batch {g}: {failed} other rank(s) could not read the stream")
        if count == 0:
            raise DatasetError(f"epoch {epoch}, batch {g}: not one of its {self.size} images can be read")
        assert raw is not None
        return raw, count

    def _augmented(self, images_NCHW: Tensor, slots_n: Tensor, round: int, step: int) -> Tensor:
        if self.augment_spec is None or not num_uniforms(self.augment_spec):
            return images_NCHW
        shape = (num_uniforms(self.augment_spec),)
        uniforms_NP = self.randomness.uniform(
            "augment/stream", slots_n, shape, round=round, step=step, dtype=self.dtype
        )
        return augment(images_NCHW, uniforms_NP, self.augment_spec)


class StreamSource:
    """Mini-batches of a stream for the student, spread over the world.

    With `steps` None a round is an epoch over what is selected; else a round is `steps` batches of endless epochs.

    Args:
        reader: over the world.
        selector: which samples are used, and when that is asked anew.
        exchange: has every teacher answer for every rank's images.
        steps: student steps of a round, or None.
        maker: further versions of the images that the objective compares, or None.
    """

    players: Sequence[Player] = ()

    def __init__(
        self,
        reader: StreamReader,
        selector: Selector | None,
        exchange: Exchange,
        steps: int | None,
        maker: ViewMaker | None = None,
    ) -> None:
        self.reader, self.selector, self.exchange = reader, selector, exchange
        self.steps, self.maker = steps, maker
        self._chosen_in: int | None = None if selector is not None else 0

    # ------------------------------------------------------------------------------------- selection

    def update_steps(self, round: int) -> int:
        """Scoring steps; the last one of a round makes the choice."""
        return 0 if self.selector is None else self.selector.steps(round)

    def update_phase(self, round: int, step: int) -> str:
        """`selection`."""
        return "selection"

    def update_images(self, round: int, step: int) -> int:
        """Images of one scoring step over all ranks."""
        return 0 if self.selector is None else self.selector.images

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """Score the next chunks; nobody trains."""
        if self.selector is not None:
            self.selector.score(round, step, student)
            if step == self.selector.steps(round) - 1:
                self._choose(self.selector.chosen(round), round)
        return iter(())

    def _choose(self, chosen_N: NDArray[np.bool_], round: int) -> None:
        self.reader.stream.choose(chosen_N)
        self._chosen_in = round
        if self.reader.stream.batches == 0:
            raise DatasetError(
                f"round {round}: the selection left {int(chosen_N.sum())} samples, fewer than one batch of "
                f"{self.reader.size}; lower batch, or loosen source.selection"
            )

    # ------------------------------------------------------------------------------------ student's images

    def student_steps(self, round: int) -> int:
        """Whole batches of this round's epoch."""
        self._make_sure(round)
        return self.reader.stream.batches

    def batch(self, round: int, step: int) -> Batch:
        """This rank's images of the next global batch, in as many versions as the objective wants."""
        self._make_sure(round)
        epoch, g = (
            (round, step) if self.steps is None else divmod(round * self.steps + step, self.reader.stream.batches)
        )
        batch = self.reader.read(epoch, g, round, step)
        images_NCHW, views = batch.images_NCHW, 1
        if self.maker is not None:
            assert batch.slots_N is not None
            further = self.maker(images_NCHW, batch.slots_N, round, step)
            images_NCHW, views = torch.cat([images_NCHW, *further]), 1 + len(further)
        answered = self.exchange.own(images_NCHW, views * self.reader.padded, batch.count)
        return replace(
            answered, labels_N=batch.labels_N, ids_N=batch.ids_N, slots_N=batch.slots_N, at=batch.at, views=views
        )

    def _make_sure(self, round: int) -> None:
        """A choice that a selector has made before (a manifest's, a checkpoint's) is taken up when first needed."""
        if self._chosen_in is None and self.selector is not None:
            self._choose(self.selector.chosen(round), round)

    # ----------------------------------------------------------------------------------------- state

    def close(self) -> None:
        """End the reading processes."""
        self.reader.stream.close()

    def state_dict(self) -> dict[str, Any]:
        """The present choice; the order is a function of (seed, epoch)."""
        if self.selector is None or self.reader.group.rank != 0:
            return {}
        return {SELECTION: self.selector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the choice."""
        if self.selector is not None and SELECTION in state:
            self.selector.load_state_dict(state[SELECTION])
            self._chosen_in = None


SELECTION = "selection"
"""The choice's part of a checkpoint."""
