"""Images from one generator per teacher, trained on the fly: DAFL, ZSKT, DFAD, DFQ and DFMF by weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from dfkd_dist.config import AugmentSpec, GenerativeSpec, RoundsSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.losses import adversarial
from dfkd_dist.losses.weighted import Losses, global_mean, weighted
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.base import Side
from dfkd_dist.sources.terms import GeneratorStep, generator_terms, need_of

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Kit:
    """What belongs to one teacher: its generator and, in DFMF, its assistant; in MosaicKD its discriminator.

    `answering` is the teacher's fast copy for questions without gradient.
    """

    teacher: Teacher
    answering: Teacher
    generator: Player
    assistant: Player | None
    discriminator: Player | None = None

    @property
    def side(self) -> Side:
        """The assistant with its objective."""
        assert self.assistant is not None
        return cast(Side, self.assistant.module)

    @property
    def players(self) -> list[Player]:
        """Those that train."""
        return [player for player in (self.generator, self.assistant, self.discriminator) if player is not None]


class GenerativeSource:
    """Generators (and assistants) of this rank's teachers.

    Args:
        spec: weights and options.
        rounds: warm-up and main rounds.
        batch: B, images of a generator or assistant step over the row.
        kits: one for each of this rank's teachers, in recipe order.
        mesh: groups.
        exchange: gathers the student's batch from all rows.
        randomness: counter-based, so latents depend on (round, step, index) alone.
        augment_spec: how images are augmented for the student.
        dtype: of latents and images.
        device: where they live.
        autocast: the number format of trained networks.
    """

    def __init__(
        self,
        spec: GenerativeSpec,
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
    ) -> None:
        self.spec, self.rounds, self.size = spec, rounds, batch
        self.kits, self.mesh, self.exchange, self.randomness = list(kits), mesh, exchange, randomness
        self.augment_spec, self.dtype, self.device, self.autocast = augment_spec, dtype, device, autocast
        self.players = [player for kit in self.kits for player in kit.players]
        self._made: dict[str, Tensor] = {}

    # -------------------------------------------------------------------------------------- inner steps

    def update_steps(self, round: int) -> int:
        """One generator step, then M_GA assistant steps; warm-up has the first alone."""
        if round < self.rounds.warmup:
            return 1
        if self.spec.freeze_after_warmup or (self.spec.student_first and round == self.rounds.warmup):
            return 0
        return 1 + (self.spec.assistant.steps if self.spec.assistant is not None else 0)

    def update_phase(self, round: int, step: int) -> str:
        """`generator` or `assistant`."""
        return "generator" if step == 0 else "assistant"

    def update_images(self, round: int, step: int) -> int:
        """B for each teacher of the run."""
        return self.size * len(self.exchange.shapes)

    def update(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """Algorithm 1, lines 5-7, 13-16 (step 0) and 17-22 (the others), for this rank's teachers."""
        for kit in self.kits:
            if step == 0:
                yield kit.generator, self._generator_losses(kit, round, student, observe)
            else:
                assert kit.assistant is not None
                yield kit.assistant, self._assistant_losses(kit, round, step)

    def _generator_losses(self, kit: Kit, round: int, student: ImageNetwork, observe: bool) -> Losses:
        warm = round < self.rounds.warmup
        weights = self.spec.warmup_weights() if warm else self.spec.loss.weights()
        own = self._own(self.size)
        with self.autocast():
            images_NCHW = kit.generator.module(self._latents(kit, "generator", own, round, 0)).to(self.dtype)
        signals = kit.teacher(images_NCHW, need_of(weights))
        opponent = self._opponent(kit, student) if weights["adv"] > 0 else None
        other_NC = self._read(opponent, images_NCHW) if opponent is not None else None
        scores = self._scores(kit, images_NCHW) if weights.get("patch", 0.0) > 0 else None
        step = GeneratorStep(signals, other_NC, self.size, self.mesh.sync, self.mesh.row.size, scores)
        terms = self._terms(step)
        report = self._disagreements(kit, student, images_NCHW, signals) if observe and not warm else {}
        if self.spec.student_images == "from_update":
            self._made[kit.teacher.name] = images_NCHW.detach()
        return weighted(terms, weights, report)

    def _terms(self, step: GeneratorStep) -> dict[str, Callable[[], Tensor]]:
        return generator_terms(step, self.spec.bn, self.spec.adversary)

    def _scores(self, kit: Kit, images_NCHW: Tensor) -> Tensor:
        """A discriminator's scores of the images, where the source has one."""
        raise NotImplementedError("only MosaicKD's source has discriminators")

    def _opponent(self, kit: Kit, student: ImageNetwork) -> ImageNetwork:
        if self.spec.adversary.against == "student":
            return student
        return kit.side.network

    def _read(self, network: ImageNetwork, images_NCHW: Tensor) -> Tensor:
        """Logits of a network that this step may not change; gradient reaches the images."""
        with reading_only(network, self.spec.adversary.batch_norm, self.mesh.sync), self.autocast():
            return network(images_NCHW).logits_NC

    def _disagreements(
        self, kit: Kit, student: ImageNetwork, images_NCHW: Tensor, signals: Signals
    ) -> dict[str, Tensor]:
        """D(T, S) and D(T, A) on the generator's images (DFMF Fig. 4): shown, never optimised."""
        others = {"D(T,S)": student}
        if kit.assistant is not None:
            others["D(T,A)"] = self._opponent(kit, student)
        tau, shown = self.spec.adversary.temperature, {}
        with torch.no_grad():
            for name, network in others.items():
                other_NC = self._read(network, images_NCHW)
                shown[name] = global_mean(-adversarial.kl(signals.logits_NC, other_NC, tau), self.size)
        return shown

    def _assistant_losses(self, kit: Kit, round: int, step: int) -> Losses:
        own = self._own(self.size)
        images_NCHW = self._student_images(kit, "assistant", own, round, step)
        with torch.no_grad():
            answer = kit.answering(images_NCHW, kit.side.need)
        with self.autocast():
            return kit.side(Batch(images_NCHW, self.size), [answer])

    # ---------------------------------------------------------------------------------- student's images

    def batch(self, round: int, step: int) -> Batch:
        """b = floor(B / K) images from every generator (Algorithm 1, lines 24-27), mixed over the column."""
        each = self.size // len(self.exchange.shapes)
        own = self._own(each)
        if self.spec.student_images == "from_update":
            # All B images were made in slices of B; the student takes the first b of them.
            images = [self._first_of_update(kit, each, round, step) for kit in self.kits]
        else:
            images = [self._student_images(kit, "student", own, round, step) for kit in self.kits]
        return replace(self.exchange.gather(images, each), at=(round, step))

    def student_steps(self, round: int) -> int:
        """Never asked for: the recipe says how many (images are made without end)."""
        raise NotImplementedError("rounds.student_steps must be a number for a generative source")

    def _student_images(self, kit: Kit, purpose: str, own: Tensor, round: int, step: int) -> Tensor:
        """Augmented images that carry no gradient; the generator is only read, with its batch statistics."""
        with torch.no_grad():
            return self._augment(self._generate(kit, purpose, own, round, step), kit, purpose, own, round, step)

    def _generate(self, kit: Kit, purpose: str, own: Tensor, round: int, step: int) -> Tensor:
        latents_NZ = self._latents(kit, purpose, own, round, step)
        with torch.no_grad(), reading_only(kit.generator.module, "batch", self.mesh.sync), self.autocast():
            return kit.generator.module(latents_NZ).to(self.dtype)

    def _augment(self, images_NCHW: Tensor, kit: Kit, purpose: str, own: Tensor, round: int, step: int) -> Tensor:
        wanted = num_uniforms(self.augment_spec)
        if wanted == 0:
            return images_NCHW
        uniforms_NP = self.randomness.uniform(
            f"augment/{purpose}", own, (wanted,), owner=kit.teacher.name, round=round, step=step, dtype=self.dtype
        )
        return augment(images_NCHW, uniforms_NP, self.augment_spec)

    def _first_of_update(self, kit: Kit, each: int, round: int, step: int) -> Tensor:
        """This rank's slice of the first b images that the round's generator step made."""
        made = self._whole(self._made[kit.teacher.name])
        own = self._own(each)
        with torch.no_grad():
            return self._augment(made[own], kit, "student", own, round, step)

    def _whole(self, part_NCHW: Tensor) -> Tensor:
        """The row's images of one generator step, in index order, on each of its ranks."""
        row = self.mesh.row
        if row.size == 1:
            return part_NCHW
        spans = [bounds(self.size, row.size, r) for r in range(row.size)]
        longest = max(high - low for low, high in spans)
        padded = torch.cat([part_NCHW, part_NCHW.new_zeros(longest - len(part_NCHW), *part_NCHW.shape[1:])])
        parts = row.gather(padded)
        return torch.cat([part[: high - low] for part, (low, high) in zip(parts, spans, strict=True)])

    def _own(self, count: int) -> Tensor:
        """Indices of this rank's slice of `count` images of the row."""
        low, high = bounds(count, self.mesh.row.size, self.mesh.row.rank)
        return torch.arange(low, high, device=self.device)

    def _latents(self, kit: Kit, purpose: str, own: Tensor, round: int, step: int) -> Tensor:
        """`[n, latent]` standard normal. With `per_round`, generator and student steps of a round share them (ZSKT)."""
        if self.spec.latents == "per_round" and purpose in ("generator", "student"):
            purpose, step = "round", 0
        return self.randomness.normal(
            f"latent/{purpose}",
            own,
            (self.spec.generator.latent,),
            owner=kit.teacher.name,
            round=round,
            step=step,
            dtype=self.dtype,
        )

    def sample(self, kit: Kit, count: int, first: int = 0) -> Tensor:
        """`count` images of one generator for looking at or for measuring: unaugmented, the same at every call.

        They are numbers `first` and on of an endless row of latents; batch norm sees the `count` together.
        """
        own = torch.arange(first, first + count, device=self.device)
        latents_NZ = self.randomness.normal(
            "latent/sample", own, (self.spec.generator.latent,), owner=kit.teacher.name, dtype=self.dtype
        )
        with torch.no_grad(), reading_only(kit.generator.module, "batch"), self.autocast():
            return kit.generator.module(latents_NZ).to(self.dtype)

    # ----------------------------------------------------------------------------------------- state

    def close(self) -> None:
        """Nothing reads ahead."""

    def state_dict(self) -> dict[str, Any]:
        """Images kept between a generator step and the student's (`from_update`), whole, so any ranks can resume."""
        return {name: self._whole(part).cpu() for name, part in self._made.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take this rank's slice of the images kept for its teachers."""
        own, mine = self._own(self.size).cpu(), [kit.teacher.name for kit in self.kits]
        self._made = {name: state[name][own].to(self.device) for name in mine if name in state}
