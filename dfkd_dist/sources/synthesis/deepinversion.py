"""DeepInversion (Yin et al. 2020): the pixels are optimised, in its adaptive form against the student too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.config import AdversarySpec, DeepInversionSpec, StageSpec
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.parallel.player import Factor, Player, constant
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.synthesis.slices import Best, Slice
from dfkd_dist.sources.terms import GeneratorStep, generator_terms, image_terms, need_of


class DeepInversion:
    """Pixels of one teacher's images, new ones in every round.

    They are optimised in the teacher's normalised space, from standard normal noise. Jitter and flips are drawn once
    for the whole batch, as in the released code, so all ranks of the row roll by the same offset.

    Args:
        spec: its section of the recipe.
        bench: what it works with.
    """

    players: Sequence[Player] = ()

    def __init__(self, spec: DeepInversionSpec, bench: Bench) -> None:
        self.spec, self.bench = spec, bench
        self.mean_C11, self.std_C11 = normalisation(bench.teacher.preprocess, bench.channels)
        self._pixels = Slice(bench, f"pixels/{bench.name}", spec.lr, spec.betas)
        self._best = Best(bench)
        self._starts = [sum(stage.iterations for stage in spec.stages[:n]) for n in range(len(spec.stages))]

    def steps(self, round: int) -> int:
        """Iterations of all stages."""
        return self.spec.steps()

    def phase(self, round: int, step: int) -> str:
        """One for each stage."""
        return list(self.spec.phases())[self._stage(step)]

    def _stage(self, step: int) -> int:
        return max(n for n, start in enumerate(self._starts) if step >= start)

    # --------------------------------------------------------------------------------------------- a round

    def step(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One iteration on this rank's slice."""
        stage = self.spec.stages[self._stage(step)]
        if step in self._starts:
            self._begin(round, step, stage)
        else:
            self._clip()
        assert self._pixels.player is not None
        # Set in each step, because a state does not hold them.
        self._pixels.player.factor, self._pixels.player.total_steps = self._factor(stage), stage.iterations
        losses = self._losses(round, step, stage, student)
        if self.spec.keep == "best":
            self._best.note(self.bench.total(losses), self._pixels.values)
        yield self._pixels.player, losses

    def _begin(self, round: int, step: int, stage: StageSpec) -> None:
        """Noise, or the last stage's pixels, with a fresh optimiser."""
        bench = self.bench
        if step == 0:
            shape = (bench.channels, bench.size, bench.size)
            values = bench.randomness.normal(
                "pixels", bench.own(), shape, owner=bench.name, round=round, dtype=bench.dtype
            )
        else:
            self._clip()
            values = self._pixels.values
        self._pixels.begin(values, self._factor(stage), stage.iterations)
        self._best.forget()

    def _clip(self) -> None:
        """Into what [0, 1] is in normalised space, after the step before."""
        if self.spec.clip:
            with torch.no_grad():
                values = self._pixels.values
                values.copy_(values.clamp(self._normalised(0.0), self._normalised(1.0)))

    def _normalised(self, level: float) -> Tensor:
        return (level - self.mean_C11) / self.std_C11

    def _losses(self, round: int, step: int, stage: StageSpec, student: ImageNetwork) -> Losses:
        spec, bench = self.spec, self.bench
        weights = spec.loss.weights() if round >= bench.warmup else spec.loss.warmup_weights()
        seen_NCHW = self._seen(round, step, stage)
        images_NCHW = seen_NCHW * self.std_C11 + self.mean_C11
        signals = bench.teacher(images_NCHW, need_of(weights), scaled=True)
        other_NC = None
        if weights["js"] > 0:
            other_NC = bench.read(student, images_NCHW, spec.competition.batch_norm, scaled=True)
        at = GeneratorStep(
            signals,
            other_NC,
            bench.batch,
            bench.mesh.sync,
            bench.mesh.row.size,
            labels_N=bench.labels(spec.labels, round),
            pixels_NCHW=seen_NCHW,
        )
        terms = generator_terms(at, spec.bn, AdversarySpec()) | image_terms(at, spec.competition, spec.l2_over)
        return weighted(terms, weights)

    def _seen(self, round: int, step: int, stage: StageSpec) -> Tensor:
        """The pixels as losses see them in this iteration: at the stage's resolution, rolled, perhaps mirrored."""
        seen_NCHW = self._pixels.values
        if stage.scale > 1:
            seen_NCHW = F.avg_pool2d(seen_NCHW, stage.scale)
        if stage.jitter:
            places = 2 * stage.jitter + 1
            down, right = (n - stage.jitter for n in self.bench.one("jitter", places, 2, round, step))
            seen_NCHW = seen_NCHW.roll((down, right), dims=(2, 3))
        if self.spec.flip and self.bench.one("flip", 2, 1, round, step)[0]:
            seen_NCHW = seen_NCHW.flip(3)
        return seen_NCHW

    def _factor(self, stage: StageSpec) -> Factor:
        if self.spec.schedule == "constant" and not self.spec.warmup:
            return constant
        return rise_and_fall(stage.iterations, self.spec.warmup, cosine=self.spec.schedule == "cosine")

    def harvest(self, round: int, student: ImageNetwork) -> tuple[Tensor, Tensor]:
        """The last images, or the best; the round's memory is freed."""
        self._clip()
        values = self._best.kept[0] if self.spec.keep == "best" else self._pixels.values.detach()
        images_NCHW = values * self.std_C11 + self.mean_C11
        self._pixels.forget()
        self._best.forget()
        return images_NCHW, self.bench.labels(self.spec.labels, round)

    # ----------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Pixels, their moments and the best so far, inside a round; nothing between rounds."""
        if not self._pixels.active:
            return {}
        return {"pixels": self._pixels.state_dict(), "best": self._best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._pixels.load_state_dict(state["pixels"])
        self._best.load_state_dict(state["best"])


def normalisation(preprocess: Preprocess, channels: int) -> tuple[Tensor, Tensor]:
    """A network's mean and deviation `[C, 1, 1]`, for images of so many channels as the run has.

    Where the network has others, they are repeated (grey) or averaged (colour).
    """
    statistics = (preprocess.mean[0], preprocess.std[0])
    if len(statistics[0]) == channels:
        return statistics
    mean, std = (values_C11.mean(dim=0, keepdim=True).expand(channels, 1, 1) for values_C11 in statistics)
    return mean, std


def rise_and_fall(iterations: int, warmup: int, *, cosine: bool) -> Factor:
    """The rate's factor: (i + 1) / warmup while i < warmup, then 1 or half a cosine to the end (DeepInversion)."""

    def factor(progress: float) -> float:
        i = round(progress * iterations)
        if i < warmup:
            return (i + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (i - warmup) / (iterations - warmup))) if cosine else 1.0

    return factor
