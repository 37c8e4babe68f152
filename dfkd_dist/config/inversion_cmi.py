"""CMI: contrastive model inversion (Fang et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, NonNegative, Positive, Spec
from dfkd_dist.config.images import AugmentSpec
from dfkd_dist.config.inversion_latent import LatentLossSpec, LatentSpec


class CMILossSpec(LatentLossSpec):
    """Weights of CMI's terms."""

    cr: NonNegative = 0.0
    """Contrast: an image's local view is told from all images, those of earlier rounds included."""


class InstanceContrastSpec(Spec):
    """The term `cr`: what is compared, and with how many."""

    temperature: Positive = 0.1
    """0.2 in the script of Fast's repository."""
    dim: Count = 256
    """Width of the head's embedding."""
    bank: Count = 40_960
    """Images of earlier rounds that are remembered (as features); the oldest go first."""
    negatives: Count = 4096
    """How many of them an iteration draws; each is contrasted, and is a negative to all others."""
    layers: Annotated[list[str], Field(min_length=1)] | None = None
    """Modules of the teacher whose inputs' channel means are the features; null: all its batch norms. The released code
    takes the four stages of a ResNet-34: `[layer1, layer2, layer3, layer4]`."""
    lr: Positive | None = None
    """Of the head's Adam; null is that of the generator."""


class CMISpec(LatentSpec):
    """A new generator and new latents in every round, contrasted with the images of all rounds."""

    kind: Literal["cmi"]
    iterations: Count = 200
    lr: Positive = 1e-3
    """Of the generator and of the latents."""
    loss: CMILossSpec = CMILossSpec(bn=1.0, ce=1.0, adv=0.5, cr=0.8)
    warmup_loss: CMILossSpec | None = None
    contrast: InstanceContrastSpec = InstanceContrastSpec()
    global_view: AugmentSpec = AugmentSpec(crop_padding=4, flip=True)
    """How images are seen by the teacher, and by the adversary, in all terms."""
    local_view: AugmentSpec = AugmentSpec(resized_crop=0.25, flip=True)
    """A second view for the contrast."""

    @property
    def contrasts(self) -> bool:
        """Whether any round has the term `cr`."""
        return self.loss.cr > 0 or (self.warmup_loss is not None and self.warmup_loss.cr > 0)

    def shortened(self) -> CMISpec:
        """The same with one step for each phase, for a plan."""
        return self.model_copy(update={"iterations": 1})

    @model_validator(mode="after")
    def _game_is_consistent(self) -> CMISpec:
        self._check_game()
        return self
