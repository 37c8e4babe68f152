"""Images from generators that are trained on the fly."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, NonNegative, Positive, Spec
from dfkd_dist.config.objectives import ObjectiveSpec
from dfkd_dist.config.training import OptimizerSpec, ScheduleSpec


class GeneratorSpec(Spec):
    """One linear layer, then blocks that double the side."""

    style: Literal["upsample", "dcgan", "spatial"] = "upsample"
    """Blocks of nearest-neighbour upsampling and convolution (DFQ's generator), or of transposed convolution (DCGAN's,
    which DFAD takes for segmentation). spatial: the former without a linear layer, over latents with places (Fast on
    ImageNet); for source.kind: inversion."""
    latent: Count = 256
    width: Count = 128
    """Channels after the linear layer; halved in the last block, as usual in the field (dcgan: in all but the last)."""
    blocks: Annotated[int, Field(ge=1, le=6)] = 3
    head: Literal["sigmoid", "bn"] = "sigmoid"


class GeneratorLossSpec(Spec):
    """Weights of the generator's terms: a row of DFMF's Table 1."""

    bn: NonNegative = 0.0
    ice: NonNegative = 0.0
    """Instance entropy H(p) of Eq. 3."""
    oh: NonNegative = 0.0
    """One-hot cross-entropy with the teacher's own argmax (what DAFL's and CMI's code calls ICE)."""
    bce: NonNegative = 0.0
    act: NonNegative = 0.0
    adv: NonNegative = 0.0

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return dict(self)


class BNTermSpec(Spec):
    """How the batch-norm term is measured: Eq. 4's Gaussian KL, or L2 norms (DeepInversion)."""

    form: Literal["gaussian_kl", "l2"] = "gaussian_kl"
    channels: Literal["mean", "sum"] = "mean"
    first_layer: Positive = 1.0
    """Factor of the first layer's part (DeepInversion's code for ImageNet: 10)."""


class AdversarySpec(Spec):
    """Whom the generator's images should make disagree with the teacher, and how that is measured."""

    against: Literal["none", "assistant", "student"] = "none"
    form: Literal["kl", "l1", "log_l1", "masked_kl"] = "kl"
    temperature: Positive = 3.0
    batch_norm: Literal["eval", "batch"] = "eval"
    """How the other network's batch norm behaves in a generator step; its buffers never move."""


class AssistantSpec(Spec):
    """DFMF's generator assistants: one network per teacher that mimics it on its generator's images (Eq. 2)."""

    arch: str = "teacher"
    """`teacher` (GA=T), `student` (GA=S), or a network's name."""
    pretrained: bool = False
    steps: Count = 5
    """M_GA."""
    optimizer: OptimizerSpec = OptimizerSpec(lr=0.05, nesterov=True)
    schedule: ScheduleSpec = ScheduleSpec(kind="cosine")
    objective: ObjectiveSpec = ObjectiveSpec(kl=1.0, vid=1.0)


class GenerativeSpec(Spec):
    """Images from one generator per teacher, trained on the fly."""

    kind: Literal["generative"]
    generator: GeneratorSpec = GeneratorSpec()
    optimizer: OptimizerSpec = OptimizerSpec(kind="adam", lr=1e-3, betas=[0.5, 0.999])
    schedule: ScheduleSpec = ScheduleSpec()
    loss: GeneratorLossSpec
    warmup_loss: GeneratorLossSpec | None = None
    """Weights during warm-up; null takes `loss` without adv."""
    bn: BNTermSpec = BNTermSpec()
    adversary: AdversarySpec = AdversarySpec()
    assistant: AssistantSpec | None = None
    freeze_after_warmup: bool = False
    """DFQ without ADV: no generator steps after warm-up."""
    latents: Literal["fresh", "per_round"] = "fresh"
    """per_round: the generator step and all student steps of a round share their latents (ZSKT)."""
    student_images: Literal["fresh", "from_update"] = "fresh"
    """from_update: the student trains on the images the generator step made (DAFL)."""
    student_first: bool = False
    """No generator step in the first main round, so that each round's student steps come first (DFAD)."""

    def warmup_weights(self) -> dict[str, float]:
        """Term name to weight during warm-up."""
        return self.loss.weights() | {"adv": 0.0} if self.warmup_loss is None else self.warmup_loss.weights()

    @model_validator(mode="after")
    def _game_is_consistent(self) -> GenerativeSpec:
        against, adv = self.adversary.against, self.loss.adv
        if self.generator.style == "spatial":
            raise ValueError("generator.style is spatial, which source.kind: inversion has; allowed: upsample, dcgan")
        if adv > 0 and against == "none":
            raise ValueError(f"loss.adv is {adv} but adversary.against is none; allowed: assistant, student")
        if adv == 0 and against != "none":
            raise ValueError(f"adversary.against is {against} but loss.adv is 0; give it a weight or set against: none")
        if (against == "assistant") != (self.assistant is not None):
            raise ValueError("an `assistant` section is needed by adversary.against: assistant, and only there")
        if against == "none" and self.warmup_weights()["adv"] > 0:
            raise ValueError("warmup_loss.adv has a weight but adversary.against is none; allowed: assistant, student")
        if not self.freeze_after_warmup and not any(self.loss.weights().values()):
            raise ValueError("loss: all weights are 0, so the generator has nothing to minimise")
        if self.freeze_after_warmup and adv > 0:
            raise ValueError("freeze_after_warmup: true leaves loss.adv without effect; set loss.adv: 0")
        if self.freeze_after_warmup and self.student_images == "from_update":
            raise ValueError("student_images: from_update needs generator steps; freeze_after_warmup forbids them")
        if self.student_first and self.student_images == "from_update":
            raise ValueError("student_images: from_update needs the generator step first; set student_first: false")
        return self
