"""Fast: a generator that has learned to be adapted in a few steps (Fang et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, Positive, Spec
from dfkd_dist.config.images import AugmentSpec
from dfkd_dist.config.inversion_latent import LatentLossSpec, LatentSpec


class MetaSpec(Spec):
    """How the meta-generator theta learns from phi, the copy of it that a round has adapted; no second derivatives."""

    gradient: Literal["sum", "last", "reptile"] = "sum"
    """sum: of phi's gradients in all iterations (first-order MAML as the released code has it); last: that of the last
    iteration alone; reptile: `scale` times theta - phi."""
    scale: Positive = 67.0
    """Of reptile (1 in the released code for ImageNet); to Adam it matters little."""
    lr: Positive | None = None
    """Of theta's Adam; null: the inner rate times the number of iterations."""
    lr_latents: Positive = 5e-3
    """The same of persistent latents."""


class FastSpec(LatentSpec):
    """A few steps from the meta-generator in every round, and one of the meta-generator after them."""

    kind: Literal["fast"]
    iterations: Count = 10
    """K."""
    lr: Positive = 2e-3
    """Of phi."""
    lr_latents: Positive = 0.01
    loss: LatentLossSpec = LatentLossSpec(bn=10.0, ce=0.4, adv=1.1)
    bn_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """m: the term bn compares (1 - m) x the batch's statistics + m x an average over the rounds before."""
    meta: MetaSpec = MetaSpec()
    reset_at: CountOrZero | None = None
    """The round (counted from 0) at whose beginning theta's first layer and the batch norm behind it are drawn anew."""
    latents: Literal["fresh", "persistent"] = "fresh"
    """fresh: drawn in every round; persistent: learned over the rounds as theta is (ImageNet)."""
    redraw_every: CountOrZero = 0
    """Persistent latents are drawn anew, and the meta-optimisers begin afresh, in each round whose number (counted from
    1) is a multiple of this; 0: never."""
    view: AugmentSpec = AugmentSpec(crop_padding=4, flip=True)
    """How images are seen by the teacher and by the adversary."""

    def redraws(self, round: int) -> bool:
        """Whether persistent latents are drawn anew at the beginning of a round (counted from 0)."""
        return self.redraw_every > 0 and (round + 1) % self.redraw_every == 0

    def shortened(self) -> FastSpec:
        """The same with one step for each phase, for a plan."""
        return self.model_copy(update={"iterations": 1})

    @model_validator(mode="after")
    def _parts_fit(self) -> FastSpec:
        self._check_game()
        if self.redraw_every and self.latents == "fresh":
            raise ValueError(f"redraw_every is {self.redraw_every}, but latents: fresh are drawn in every round anyway")
        return self
