"""MosaicKD: generators held to the patches of real images from another domain."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dfkd_dist.config.base import Count, CountOrZero, NonNegative, Spec
from dfkd_dist.config.generative import AdversarySpec, GenerativeSpec, GeneratorLossSpec
from dfkd_dist.config.images import AugmentSpec
from dfkd_dist.config.streams import ReaderSpec, SelectionSpec
from dfkd_dist.config.training import OptimizerSpec, ScheduleSpec


class MosaicLossSpec(GeneratorLossSpec):
    """Weights of the generator's terms. In the paper's words: L_local is `patch`, H(p(y|G(z))) of L_align is `ice`."""

    patch: NonNegative = 0.0
    """Its patches should pass for real ones (Eqs. 3 and 4, counted once)."""


class DiscriminatorSpec(Spec):
    """A patch discriminator for each teacher's generator (MosaicKD section 4.2)."""

    field: Literal[1, 2, 4, 8, 10, 18, 22, 32, "image"] = 8
    """L: side of the patches in pixels; `image` is the whole image ("w/o patch learning")."""
    width: Count = 128
    """Channels after its first convolution."""
    stride: Count = 1
    """s: every s-th score of the map counts, so that the patches overlap less."""
    optimizer: OptimizerSpec = OptimizerSpec(kind="adam", lr=1e-3, betas=[0.5, 0.999])
    schedule: ScheduleSpec = ScheduleSpec()
    form: Literal["non_saturating", "saturating"] = "non_saturating"
    """What the generator minimises: -log D(G(z)), or log(1 - D(G(z))) as printed."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the patches of an image: Eq. 3's expectation, or the sum (and half of it for the discriminator) of the
    released code, which at 32 px makes `loss.patch` weigh 64 times as much."""
    batch_norm: Literal["eval", "batch"] = "batch"
    """How its batch norm behaves in a generator step; its buffers never move there."""
    images: Literal["fresh", "generator"] = "fresh"
    """It learns from made images of its own (Algorithm 1), or from those of the generator step that follows (the
    released code)."""


class MosaicSpec(GenerativeSpec):
    """MosaicKD: Algorithm 1 is one discriminator step, one generator step, then `rounds.student_steps` of the student.

    The defaults are the method: the weights of its released command (whose balance term has log2: 10 is 14.427 nats),
    the adversary being the student at temperature 1.
    """

    kind: Literal["mosaic"]  # type: ignore[assignment]
    loss: MosaicLossSpec = MosaicLossSpec(patch=1.0, ice=1.0, bce=14.427, adv=1.0)
    warmup_loss: MosaicLossSpec | None = None
    adversary: AdversarySpec = AdversarySpec(against="student", temperature=1.0, batch_norm="batch")
    discriminator: DiscriminatorSpec | None = DiscriminatorSpec()
    """null leaves it out ("w/o disc.")."""
    reader: ReaderSpec | None = None
    """The shards of images from another domain: real patches, and with `ood_batch` the student's too."""
    selection: SelectionSpec | None = None
    """Which of them are used; null uses every one."""
    ood_batch: CountOrZero = 0
    """Real images in the student's batch beside the made ones: 0 is Algorithm 1, 256 the released code."""
    ood_augment: AugmentSpec = AugmentSpec(crop_padding=4, flip=True)
    """Augmentation of those. (The recipe's `augment` is for made images; the discriminator's real ones have none.)"""

    @model_validator(mode="after")
    def _parts_belong_together(self) -> MosaicSpec:
        weights = {"loss": self.loss.patch, "warmup_loss": self.warmup_loss.patch if self.warmup_loss else 0.0}
        used = {f"{key}.patch": weight for key, weight in weights.items() if weight > 0}
        if self.discriminator is None and used:
            key, weight = next(iter(used.items()))
            raise ValueError(f"{key} is {weight} but discriminator is null; give one, or set {key}: 0")
        if self.discriminator is not None and not used:
            raise ValueError("loss.patch is 0, so nothing listens to the discriminator; set discriminator: null")
        reads = self.discriminator is not None or self.ood_batch > 0
        if reads and self.reader is None:
            what = "discriminator" if self.discriminator is not None else f"ood_batch: {self.ood_batch}"
            raise ValueError(f"{what} needs real images; give source.reader the shards they come from")
        if self.reader is not None and not reads:
            raise ValueError("reader is given, but discriminator is null and ood_batch is 0, so nothing would be read")
        if self.selection is not None and self.reader is None:
            raise ValueError("selection chooses among the images of `reader`, which is not given")
        if self.selection is not None and self.selection.kind == "kd3":
            raise ValueError(
                "selection.kind is kd3, which selects anew in every round of a stream; allowed here: manifest, top, "
                "random"
            )
        return self

    def check_size(self, size: int) -> None:
        """Refuse images of `size` px that are smaller than a patch.

        Raises:
            ValueError: names the key, both sizes and what is allowed.
        """
        field = self.discriminator.field if self.discriminator is not None else "image"
        if field != "image" and field > size:
            raise ValueError(
                f"source.discriminator.field is {field}, but image.size is only {size}; "
                f"allowed: a patch size up to {size}, or image"
            )
