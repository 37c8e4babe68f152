"""The typed recipe: one YAML file (plus dotted overrides) checked whole before any work is done.

A recipe states only what differs from the defaults below, and may name another recipe as its `base`. Every
error names the key, the value that was given and what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Channels, Count, CountOrZero, Fraction, NonNegative, OutDir, Positive, Spec


class ImageSpec(Spec):
    """The canonical image space of a run: `[N, channels, size, size]`, nominally in [0, 1]."""

    size: Annotated[int, Field(ge=4, le=1024)]
    channels: Channels


class OptimizerSpec(Spec):
    """An optimiser over one player's parameters."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: NonNegative = 0.0
    clip: Positive | None = None
    """Largest global gradient norm; null leaves gradients as they are."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.nesterov and (self.kind != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: true needs kind: sgd with momentum > 0")
        return self


class ScheduleSpec(Spec):
    """The learning rate over a player's own steps, as a factor of `lr`."""

    kind: Literal["constant", "cosine", "multistep"] = "constant"
    milestones: list[Fraction] = []
    """multistep: fractions of all steps after which the rate is multiplied by gamma."""
    gamma: Positive = 0.1
    floor: Fraction = 0.0
    """cosine: the factor at the end."""

    @model_validator(mode="after")
    def _milestones_belong_to_multistep(self) -> ScheduleSpec:
        if (self.kind == "multistep") != bool(self.milestones):
            raise ValueError("milestones are needed by kind: multistep, and only there")
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones must rise, got {self.milestones}")
        return self


class TeacherSpec(Spec):
    """A trained network and how it wants its input. Keys left out come from `NAME.json` beside the weights."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    weights: str
    """A safetensors or state dict file; `random` for a dry run."""
    arch: str | None = None
    size: Count | None = None
    channels: Channels | None = None
    mean: list[float] | None = None
    std: list[Positive] | None = None
    classes: list[str] | None = None
    weight: Positive | None = None
    """w_k of DFMF Eq. 1, normalised over the teachers; null means 1 / K."""


class StudentSpec(Spec):
    """The network to train."""

    arch: str
    weights: str | None = None
    """A file to start from, or null for a fresh start."""
    pretrained: bool = False
    """Start from the library's ImageNet weights (torchvision and timm networks)."""
    size: Count | None = None
    mean: list[float] | None = None
    std: list[Positive] | None = None
    """Input normalisation; null takes the mean of the teachers'."""
    classes: list[str] | None = None
    """Class names for the exported network; null takes the teachers'."""

    @model_validator(mode="after")
    def _one_start(self) -> StudentSpec:
        if self.weights is not None and self.pretrained:
            raise ValueError(f"weights is {self.weights!r} and pretrained is true; give one of them")
        return self


class ObjectiveSpec(Spec):
    """What a student (or an assistant) minimises: a row of weights over terms, DFMF Eqs. 1 and 2."""

    kl: NonNegative = 1.0
    vid: NonNegative = 0.0
    l1: NonNegative = 0.0
    at: NonNegative = 0.0
    ce: NonNegative = 0.0
    """Cross-entropy with labels: only with a labelled source."""
    temperature: Positive = 3.0
    kl_scale: Literal["none", "tau2"] = "none"
    """tau2 multiplies KL by the squared temperature (common in the field, not in DFMF)."""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward is KL(teacher || student)."""
    target: Literal["mean_probabilities", "mean_logits", "lowest_entropy"] = "mean_probabilities"
    """How several teachers' answers become the target of kl; l1 compares with their mean logits always."""

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {"kl": self.kl, "vid": self.vid, "l1": self.l1, "at": self.at, "ce": self.ce}

    @model_validator(mode="after")
    def _something_to_minimise(self) -> ObjectiveSpec:
        if not any(self.weights().values()):
            raise ValueError("all weights are 0; give at least one of kl, vid, l1, at, ce a positive weight")
        return self


class GeneratorSpec(Spec):
    """One linear layer, then nearest-neighbour upsampling convolution blocks (DFQ's generator)."""

    latent: Count = 256
    width: Count = 128
    """Channels after the linear layer; halved in the last block, as usual in the field."""
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


class DatasetSpec(Spec):
    """A labelled image set."""

    kind: Literal["digits", "npz", "jpg_npz", "folder", "torchvision"]
    path: str | None = None
    name: str | None = None
    """The set's name in torchvision (kind: torchvision)."""
    size: Count
    channels: Channels
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the train split kept for validation, stratified by class."""
    limit: Count | None = None
    """At most so many images of a split (the first ones)."""
    domains: list[str] | None = None

    @model_validator(mode="after")
    def _where(self) -> DatasetSpec:
        if self.kind == "torchvision" and self.name is None:
            raise ValueError("kind: torchvision needs `name`, for example CIFAR10")
        if self.kind != "digits" and self.path is None:
            raise ValueError(f"kind: {self.kind} needs `path`")
        return self


class SplitSpec(Spec):
    """DFMF section 4.1: how a training set is dealt to private parties."""

    mode: Literal["bl", "ibl"] = "bl"
    parties: Count
    ratio: Annotated[float, Field(ge=1)] = 1.0
    """r = p / q of the imbalanced split."""
    seed: int = 0

    @model_validator(mode="after")
    def _balanced_has_ratio_one(self) -> SplitSpec:
        if self.mode == "bl" and self.ratio != 1.0:
            raise ValueError(f"mode: bl means ratio 1, got {self.ratio}; did you mean mode: ibl?")
        return self


class LabelledSpec(Spec):
    """Real labelled images: private teachers and the gold standard are trained by the same loop."""

    kind: Literal["labelled"]
    dataset: DatasetSpec
    split: SplitSpec | None = None
    party: CountOrZero | None = None
    """Which party's share of `split`; null takes the whole training set."""

    @model_validator(mode="after")
    def _party_is_one_of_the_split(self) -> LabelledSpec:
        if self.party is not None and self.split is None:
            raise ValueError(f"party is {self.party} but there is no `split` to take it from")
        if self.party is not None and self.split is not None and self.party >= self.split.parties:
            raise ValueError(f"party is {self.party}; allowed: 0 to {self.split.parties - 1} (split.parties)")
        return self


class AugmentSpec(Spec):
    """Per-sample augmentation of the images the student learns from."""

    rotation: NonNegative = 0.0
    crop_padding: CountOrZero = 0
    flip: bool = False
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RoundsSpec(Spec):
    """How long a run is. One round is one outer iteration (one m of Algorithm 1's main loop)."""

    warmup: CountOrZero = 0
    """Rounds with generator steps only: N_warm-up x M."""
    main: Count
    """N x M."""
    student_steps: Count = 1
    """M_S: student steps in a main round."""

    @property
    def total(self) -> int:
        """Warm-up and main rounds."""
        return self.warmup + self.main


class MeshSpec(Spec):
    """Where teachers live."""

    rows: Count | None = None
    """Rows of the mesh; null takes the largest divisor of the ranks that is at most the number of teachers."""
    sync: Literal["global", "local"] = "global"
    """local: batch norm and batch-coupled terms see one rank's images (outside the equality promise)."""


class PrecisionSpec(Spec):
    """Number formats and layouts."""

    train: Literal["fp32", "bf16", "fp64"] = "fp32"
    teacher: Literal["fp32", "bf16", "fp64"] = "fp32"
    channels_last: bool = True
    fold_batch_norm: bool = True
    """Answers for the student come from a copy of each teacher with batch norm folded into the convolutions."""
    tf32: bool = False

    @model_validator(mode="after")
    def _doubles_go_together(self) -> PrecisionSpec:
        if (self.train == "fp64") != (self.teacher == "fp64"):
            raise ValueError(f"fp64 must be given to both train ({self.train}) and teacher ({self.teacher})")
        return self


class EvaluationSpec(Spec):
    """A labelled set for reporting; never used to choose a checkpoint."""

    dataset: DatasetSpec
    batch: Count = 256
    every: CountOrZero = 0
    """Student accuracy every so many main rounds; 0 only at the end."""
    split: SplitSpec | None = None
    """The parties' split, to report accuracy on each party's frequent classes."""


class CheckpointSpec(Spec):
    """When state goes to disk."""

    every: CountOrZero = 500
    """Rounds between checkpoints; 0 only on a stop signal and at the end."""
    keep: Count = 2


class LogSpec(Spec):
    """What is written while a run goes on."""

    every: Count = 50
    """Rounds between lines of metrics.jsonl."""
    tensorboard: bool = False
    grids: bool = True


class Recipe(Spec):
    """Everything that defines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    method: str
    about: str = ""
    seed: CountOrZero = 0
    out: OutDir = "runs/{name}"
    """The run directory; {name} and {seed} are filled in."""
    image: ImageSpec
    num_classes: Annotated[int, Field(ge=2)]
    batch: Count = 256
    """B: images of a generator step; the student's batch holds floor(B / K) from each generator."""
    rounds: RoundsSpec
    teachers: list[TeacherSpec] = []
    student: StudentSpec
    optimizer: OptimizerSpec = OptimizerSpec(lr=0.05, nesterov=True)
    schedule: ScheduleSpec = ScheduleSpec(kind="cosine")
    source: Annotated[GenerativeSpec | LabelledSpec, Field(discriminator="kind")]
    objective: ObjectiveSpec = ObjectiveSpec()
    augment: AugmentSpec = AugmentSpec()
    mesh: MeshSpec = MeshSpec()
    precision: PrecisionSpec = PrecisionSpec()
    evaluation: EvaluationSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()

    def run_dir(self) -> Path:
        """The run directory with its placeholders filled in."""
        return Path(self.out.format(name=self.name, seed=self.seed))

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        names = [t.name for t in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: names must differ, got {names}")
        if isinstance(self.source, LabelledSpec):
            self._check_labelled()
        else:
            self._check_data_free()
            self._check_warmup(self.source)
        return self

    def _check_labelled(self) -> None:
        if self.teachers:
            raise ValueError("source.kind: labelled trains from labels; teachers must be empty")
        if self.objective.ce == 0 or any(v for k, v in self.objective.weights().items() if k != "ce"):
            raise ValueError("source.kind: labelled needs objective.ce > 0 and no other objective weight")
        if self.rounds.warmup:
            raise ValueError(f"rounds.warmup is {self.rounds.warmup}; a labelled source has no warm-up (allowed: 0)")

    def _check_data_free(self) -> None:
        if not self.teachers:
            raise ValueError("teachers: at least one is needed by source.kind: generative")
        if self.objective.ce > 0:
            raise ValueError("objective.ce needs labels (source.kind: labelled)")
        if self.batch < len(self.teachers):
            raise ValueError(f"batch is {self.batch}, fewer than the {len(self.teachers)} teachers")

    def _check_warmup(self, source: GenerativeSpec) -> None:
        warmup = self.rounds.warmup
        if source.freeze_after_warmup and warmup == 0:
            raise ValueError("source.freeze_after_warmup: true needs rounds.warmup > 0, or no generator ever trains")
        if warmup and not any(source.warmup_weights().values()):
            raise ValueError(
                f"rounds.warmup is {warmup}, but every weight of the warm-up is 0; "
                "give source.warmup_loss, or set rounds.warmup: 0"
            )
