"""What CMI and Fast share: images come from a generator, and are found by optimising it together with its latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfkd_dist.config.base import Count, CountOrZero, Fraction, NonNegative, Positive, Spec
from dfkd_dist.config.generative import AdversarySpec, BNTermSpec, GeneratorSpec
from dfkd_dist.config.inversion_phases import SYNTHESIS


class LatentLossSpec(Spec):
    """Weights of the terms that the generator and its latents minimise."""

    bn: NonNegative = 0.0
    ce: NonNegative = 0.0
    """Cross-entropy with the labels that the images are to have (`oh` in the released codes)."""
    oh: NonNegative = 0.0
    """One-hot cross-entropy with the teacher's own argmax."""
    adv: NonNegative = 0.0

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return dict(self)

    def warmup_weights(self) -> dict[str, float]:
        """The same for rounds in which the student does not learn."""
        return self.weights() | {"adv": 0.0}


class LatentSpec(Spec):
    """A round begins with a generator and latents, optimises both and keeps what they make."""

    generator: GeneratorSpec = GeneratorSpec(blocks=2)
    iterations: Count
    """Of a round."""
    lr: Positive
    """Of the generator."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.5, 0.999]
    """Of Adam over the generator and the latents."""
    loss: LatentLossSpec
    warmup_loss: LatentLossSpec | None = None
    """Weights in warm-up rounds; null takes `loss` without adv."""
    adv_from: CountOrZero | None = None
    """The round (counted from 0) from which on adv counts; null is the end of the warm-up."""
    labels: Literal["balanced", "random"] = "random"
    bn: BNTermSpec = BNTermSpec(form="l2")
    adversary: AdversarySpec = AdversarySpec(against="student", form="masked_kl", temperature=1.0)
    keep: Literal["last", "best"] = "best"
    """The images of the last iteration, or of the one with the lowest loss."""

    def weights_in(self, round: int, warmup: int) -> dict[str, float]:
        """Term name to weight in a round, given how many rounds warm up."""
        warm = round < warmup and self.warmup_loss is not None
        row = self.warmup_loss.weights() if warm and self.warmup_loss is not None else self.loss.weights()
        begins = warmup if self.adv_from is None else self.adv_from
        return row | ({"adv": 0.0} if round < begins else {})

    def phases(self) -> dict[str, int]:
        """Each phase of a round's synthesis, in order, to its steps."""
        return {SYNTHESIS: self.iterations}

    def check_size(self, size: int) -> None:
        """Refuse images of `size` px that the generator cannot make.

        Raises:
            ValueError: names the key, what was found and what is allowed.
        """
        blocks = self.generator.blocks
        if self.generator.style == "dcgan" and size % 2**blocks:
            raise ValueError(
                f"source.synthesis.generator.style is dcgan, whose {blocks} blocks double the side; image.size is "
                f"{size}, allowed: multiples of {2**blocks}"
            )

    def _check_game(self) -> None:
        """Raise ValueError unless something is minimised, and adv has an opponent."""
        if not any(self.loss.weights().values()):
            raise ValueError("loss: all weights are 0, so the images have nothing to minimise")
        if self.loss.adv > 0 and self.adversary.against == "none":
            raise ValueError(
                f"loss.adv is {self.loss.adv:g} but adversary.against is none; allowed: assistant, student"
            )
