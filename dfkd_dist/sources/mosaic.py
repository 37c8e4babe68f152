"""MosaicKD: generators whose patches must pass for those of real images from another domain (Algorithm 1).

Real and made images are both in image space. (The released code normalises the real ones with their own set's mean and
deviation and the made ones with the teacher's, so that its discriminator can tell them apart by that alone.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import AugmentSpec, MosaicSpec, RoundsSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.losses import patch
from dfkd_dist.losses.weighted import Losses, global_mean, weighted
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.generative import Autocast, GenerativeSource, Kit
from dfkd_dist.sources.selection import Selector
from dfkd_dist.sources.stream import SELECTION, StreamReader
from dfkd_dist.sources.terms import GeneratorStep, generator_terms

DISCRIMINATOR = "discriminator"
"""The phase of its steps, and the purpose of its latents."""


class MosaicSource(GenerativeSource):
    """Generators and patch discriminators of this rank's teachers, and the student's images.

    A round is the selection's steps (where there are any), one discriminator step, one generator step, then those of
    the assistants. All discriminators learn from the same real batch of the round; batch n of a stream is a function of
    n alone, so the players and the choice are all the state.

    Args:
        spec: weights and options.
        rounds: warm-up and main rounds.
        batch: B, made (and real) images of a discriminator's or generator's step over the row.
        kits: one for each of this rank's teachers, in recipe order.
        mesh: groups.
        exchange: gathers the student's batch from all rows.
        randomness: counter-based.
        augment_spec: how made images are augmented for the student.
        dtype: of latents and images.
        device: where they live.
        autocast: the number format of trained networks.
        patches: B real images a batch, as they are, over the row; None without discriminators.
        beside: `ood_batch` real images a batch over the world, augmented, for the student; None where it sees none.
        selector: which real images are used; None for all.
    """

    spec: MosaicSpec

    def __init__(
        self,
        spec: MosaicSpec,
        rounds: RoundsSpec,
        batch: int,
        kits: Sequence[Kit],
        mesh: Mesh,
        exchange: Exchange,
        randomness: Randomness,
        augment_spec: AugmentSpec,
        dtype: torch.dtype,
        device: torch.device,
        autocast: Autocast = nullcontext,
        *,
        patches: StreamReader | None = None,
        beside: StreamReader | None = None,
        selector: Selector | None = None,
    ) -> None:
        super().__init__(spec, rounds, batch, kits, mesh, exchange, randomness, augment_spec, dtype, device, autocast)
        self.patches, self.beside, self.selector = patches, beside, selector
        self._waiting = selector is not None

    # -------------------------------------------------------------------------------------- inner steps

    def update_steps(self, round: int) -> int:
        """The selection's, then one of the discriminator and those of every generative source."""
        game = super().update_steps(round)
        return self._selecting(round) + (game + self._judging if game else 0)

    def update_phase(self, round: int, step: int) -> str:
        """`selection`, `discriminator`, `generator` or `assistant`."""
        selecting = self._selecting(round)
        if step < selecting:
            return SELECTION
        if step < selecting + self._judging:
            return DISCRIMINATOR
        return super().update_phase(round, step - selecting - self._judging)

    def update_images(self, round: int, step: int) -> int:
        """B for each teacher of the run, or the images that are scored."""
        if self.selector is not None and step < self._selecting(round):
            return self.selector.images
        return super().update_images(round, step)

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """Algorithm 1, lines 3-5 (the discriminators) and 6-11 (the generators), for this rank's teachers."""
        selecting = self._selecting(round)
        if step < selecting:
            self._select(round, step, student)
        elif step < selecting + self._judging:
            yield from self._discriminators(round, observe)
        else:
            yield from super().update(round, step - selecting - self._judging, student, observe)

    @property
    def _judging(self) -> int:
        """Discriminator steps of a round."""
        return 0 if self.spec.discriminator is None else 1

    def _discriminators(self, round: int, observe: bool) -> Iterator[tuple[Player, Losses]]:
        assert self.patches is not None
        real = self._real_batch(self.patches, round, round, 0)
        for kit in self.kits:
            assert kit.discriminator is not None
            yield kit.discriminator, self._discriminator_losses(kit, real, round, observe)

    def _discriminator_losses(self, kit: Kit, real: Batch, round: int, observe: bool) -> Losses:
        """Eq. 3 as the discriminator sees it; the generator is only read."""
        spec = self.spec.discriminator
        assert spec is not None and kit.discriminator is not None
        purpose = "generator" if spec.images == "generator" else DISCRIMINATOR
        made_NCHW = self._generate(kit, purpose, self._own(self.size), round, 0)
        with self.autocast():
            # One pass each, so that batch norm sees real and made images apart, as the generator's step sees its own.
            real_scores = kit.discriminator.module(real.images_NCHW)
            made_scores = kit.discriminator.module(made_NCHW)
        terms = {
            "real": lambda: global_mean(patch.real(real_scores, spec.reduction), real.count),
            "fake": lambda: global_mean(patch.fake(made_scores, spec.reduction), self.size),
        }
        shown = self._beliefs(real_scores, real.count, made_scores) if observe else {}
        return weighted(terms, dict.fromkeys(terms, patch.discriminator_weight(spec.reduction)), shown)

    def _beliefs(self, real_scores: Tensor, count: int, made_scores: Tensor) -> dict[str, Tensor]:
        """Mean of D over the patches of real and of made images: shown, never optimised."""
        with torch.no_grad():
            believed = [scores.sigmoid().flatten(1).mean(dim=1) for scores in (real_scores, made_scores)]
            return {"D(real)": global_mean(believed[0], count), "D(made)": global_mean(believed[1], self.size)}

    def _terms(self, step: GeneratorStep) -> dict[str, Callable[[], Tensor]]:
        return generator_terms(step, self.spec.bn, self.spec.adversary, self.spec.discriminator)

    def _scores(self, kit: Kit, images_NCHW: Tensor) -> Tensor:
        """The discriminator is only read: gradient reaches the images."""
        spec = self.spec.discriminator
        assert spec is not None and kit.discriminator is not None
        module = kit.discriminator.module
        with reading_only(module, spec.batch_norm, self.mesh.sync), self.autocast():
            scores: Tensor = module(images_NCHW)
        return scores

    # ---------------------------------------------------------------------------------- student's images

    def batch(self, round: int, step: int) -> Batch:
        """Made images, dealt over the column; with `ood_batch`, this rank's slots of a batch of real ones beside."""
        made = super().batch(round, step)
        if self.beside is None:
            return made
        number = (round - self.rounds.warmup) * self.steps_per_round + step
        real = self._real_batch(self.beside, number, round, step)
        answered = self.exchange.own(real.images_NCHW, self.beside.padded, real.count)
        return Batch.joined(made, answered)

    @property
    def steps_per_round(self) -> int:
        """Student steps of a main round."""
        steps = self.rounds.student_steps
        assert isinstance(steps, int)
        return steps

    def _real_batch(self, reader: StreamReader, number: int, round: int, step: int) -> Batch:
        """Batch `number` of the endless sequence of a stream's epochs."""
        self._make_sure(round)
        epoch, g = divmod(number, reader.stream.batches)
        return reader.read(epoch, g, round, step)

    # -------------------------------------------------------------------------------------- selection

    def _selecting(self, round: int) -> int:
        """Scoring steps of a round."""
        return 0 if self.selector is None else self.selector.steps(round)

    def _select(self, round: int, step: int, student: ImageNetwork) -> None:
        assert self.selector is not None
        self.selector.score(round, step, student)
        if step == self._selecting(round) - 1:
            self._waiting = True
            self._make_sure(round)

    def _make_sure(self, round: int) -> None:
        """A choice is taken up when it is first needed: one just made, a manifest's, a checkpoint's."""
        if not self._waiting or self.selector is None:
            return
        chosen_N = self.selector.chosen(round)
        for key, reader in (("batch", self.patches), ("source.ood_batch", self.beside)):
            if reader is None:
                continue
            reader.stream.choose(chosen_N)
            if reader.stream.batches == 0:
                raise DatasetError(
                    f"round {round}: the selection left {int(chosen_N.sum())} samples, fewer than one batch of "
                    f"{reader.size}; lower {key}, or loosen source.selection"
                )
        self._waiting = False

    # ----------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Images kept (`from_update`), by teacher, and the present choice."""
        own = super().state_dict()
        if self.selector is None or self.mesh.rank != 0:
            return own
        return own | {SELECTION: self.selector.state_dict()}

    def close(self) -> None:
        """End the reading processes."""
        for reader in (self.patches, self.beside):
            if reader is not None:
                reader.stream.close()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        super().load_state_dict(state)
        if self.selector is not None and SELECTION in state:
            self.selector.load_state_dict(state[SELECTION])
            self._waiting = True
