"""Images that are optimised round by round into a pool, from which the student learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, Fraction, NonNegative, Positive, Spec
from dfkd_dist.config.generative import AssistantSpec, BNTermSpec
from dfkd_dist.config.inversion_cmi import CMISpec
from dfkd_dist.config.inversion_fast import FastSpec
from dfkd_dist.config.inversion_latent import LatentSpec
from dfkd_dist.config.inversion_phases import SYNTHESIS


class PoolSpec(Spec):
    """What was made and is kept: the newest images in memory, all of them in shards of the run."""

    memory_gb: Positive = 4.0
    """Images (uint8) that each rank keeps in its device's memory; older ones are read from the shards."""
    shard: Count = 1000
    """Images of a shard. The last, unfinished one is in memory and in the checkpoints."""
    folder: str | None = None
    """Where the shards go; null is `pool` in the run's directory. All ranks must see it."""
    targets: Literal["asked", "stored"] = "asked"
    """The teachers answer for each (augmented) batch anew, or once for each image as it is kept."""


class StageSpec(Spec):
    """Iterations at one resolution; the optimiser starts afresh with each stage."""

    iterations: Count
    scale: Literal[1, 2, 4, 8] = 1
    """Images are averaged over squares of so many pixels before the networks see them."""
    jitter: CountOrZero = 0
    """Images are rolled by up to so many pixels, counted at this resolution: one offset for the whole batch."""


class CompetitionSpec(Spec):
    """Adaptive DeepInversion: how the student's and the teacher's disagreement is measured."""

    form: Literal["clamped", "negative"] = "clamped"
    """1 - clamp(JS, 0, 1) of the batch's mean JS, or -JS (CMI's port)."""
    divergence: Literal["released", "jensen_shannon"] = "released"
    """The released code's: probabilities clamped to [0.01, 0.99], KL(M || P) and KL(M || Q); or JS as in the paper."""
    temperature: Positive = 3.0
    batch_norm: Literal["eval", "batch"] = "eval"
    """How the student's batch norm behaves; its buffers never move."""


class DeepInversionLossSpec(Spec):
    """Weights of the terms that the images minimise."""

    ce: NonNegative = 1.0
    """Cross-entropy with the labels that the images are to have."""
    bn: NonNegative = 0.0
    tv: NonNegative = 0.0
    """Norms of the differences between neighbours in four directions."""
    tv_l1: NonNegative = 0.0
    """Means of their absolute values."""
    l2: NonNegative = 0.0
    js: NonNegative = 0.0
    """Competition with the student; nothing in warm-up rounds, in which it does not learn."""

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return dict(self)

    def warmup_weights(self) -> dict[str, float]:
        """The same for rounds in which the student does not learn."""
        return self.weights() | {"js": 0.0}


class DeepInversionSpec(Spec):
    """DeepInversion: pixels are the parameters. They live in the teacher's normalised space, as its losses do."""

    kind: Literal["deepinversion"]
    stages: Annotated[list[StageSpec], Field(min_length=1)] = [StageSpec(iterations=2000, jitter=2)]
    lr: Positive = 0.05
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    schedule: Literal["constant", "cosine"] = "constant"
    """Of each stage."""
    warmup: CountOrZero = 0
    """Iterations of each stage in which the rate rises linearly."""
    clip: bool = False
    """Pixels are brought back to [0, 1] after every iteration."""
    flip: bool = False
    """The whole batch is mirrored in half of the iterations."""
    labels: Literal["balanced", "random"] = "balanced"
    keep: Literal["last", "best"] = "last"
    """The images after the last iteration, or those of the last stage's iteration with the lowest loss."""
    loss: DeepInversionLossSpec = DeepInversionLossSpec(bn=10.0, tv=2.5e-5)
    bn: BNTermSpec = BNTermSpec(form="l2")
    l2_over: Literal["image", "batch"] = "image"
    """l2: the mean of the images' norms (ImageNet's script), or the norm of the batch (CIFAR's)."""
    competition: CompetitionSpec = CompetitionSpec()

    def weights_in(self, round: int, warmup: int) -> dict[str, float]:
        """Term name to weight in a round, given how many rounds warm up."""
        return self.loss.warmup_weights() if round < warmup else self.loss.weights()

    def steps(self) -> int:
        """Iterations of a round."""
        return sum(stage.iterations for stage in self.stages)

    def phases(self) -> dict[str, int]:
        """Each phase of a round's synthesis, in order, to its steps."""
        if len(self.stages) == 1:
            return {SYNTHESIS: self.stages[0].iterations}
        return {f"{SYNTHESIS} {n}": stage.iterations for n, stage in enumerate(self.stages, start=1)}

    def shortened(self) -> DeepInversionSpec:
        """The same with one step for each phase, for a plan."""
        stages = [stage.model_copy(update={"iterations": 1}) for stage in self.stages]
        return self.model_copy(update={"stages": stages, "warmup": 0})

    def check_size(self, size: int) -> None:
        """Refuse a stage whose squares do not fill images of `size` px, or with a jitter of more than their side.

        Raises:
            ValueError: names the key, what was found and what is allowed.
        """
        for n, stage in enumerate(self.stages):
            key, side = f"source.synthesis.stages.{n}", size // stage.scale
            if size % stage.scale:
                raise ValueError(f"{key}.scale is {stage.scale}, which does not divide image.size ({size})")
            if stage.jitter >= side:
                raise ValueError(f"{key}.jitter is {stage.jitter}; allowed at {side} px: less than that")

    @model_validator(mode="after")
    def _something_to_do(self) -> DeepInversionSpec:
        if not any(self.loss.weights().values()):
            raise ValueError("loss: all weights are 0, so the images have nothing to minimise")
        shortest = min(stage.iterations for stage in self.stages)
        if self.warmup >= shortest > 1:
            raise ValueError(f"warmup is {self.warmup}; allowed: fewer than the {shortest} iterations of a stage")
        return self


AnySynthesisSpec = Annotated[DeepInversionSpec | CMISpec | FastSpec, Field(discriminator="kind")]
"""One kind for each method. Each offers `loss.weights()`, `loss.warmup_weights()`, `weights_in()`, `phases()`,
`shortened()` and `check_size()`."""


class InversionSpec(Spec):
    """Images optimised round by round into a pool: one synthesis per teacher, a harvest, then the student's steps."""

    kind: Literal["inversion"]
    synthesis: AnySynthesisSpec
    batch: Count | None = None
    """Images that a round makes for each teacher; null is the recipe's `batch` (that of a student step)."""
    pool: PoolSpec = PoolSpec()
    assistant: AssistantSpec | None = None
    """DFMF's `CMI (w/ GA)`: for each teacher a network that mimics it on the pool's images of this teacher, and that
    adv plays against in the student's place. Its `steps` of a main round come after the harvest."""

    def per_round(self, batch: int) -> int:
        """Images that a round makes for each teacher, given the recipe's batch."""
        return self.batch or batch

    def check_size(self, size: int) -> None:
        """Refuse images of `size` px that the synthesis cannot make.

        Raises:
            ValueError: names the key, what was found and what is allowed.
        """
        self.synthesis.check_size(size)

    @model_validator(mode="after")
    def _assistants_have_a_game(self) -> InversionSpec:
        against = self.synthesis.adversary.against if isinstance(self.synthesis, LatentSpec) else "none"
        if (against == "assistant") != (self.assistant is not None):
            raise ValueError(
                "an `assistant` section is needed by synthesis.adversary.against: assistant (of kind: cmi, fast), and "
                f"only there; found {against}"
            )
        return self
