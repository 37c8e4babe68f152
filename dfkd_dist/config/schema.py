"""The typed recipe: one YAML file (plus dotted overrides) checked whole before any work is done.

A recipe states only what differs from the defaults below, and may name another recipe as its `base`. Every
error names the key, the value that was given and what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, OutDir, Spec
from dfkd_dist.config.compensation import KDCISpec
from dfkd_dist.config.generative import GenerativeSpec
from dfkd_dist.config.images import AugmentSpec, EvaluationSpec, LabelledSpec
from dfkd_dist.config.inversion import InversionSpec
from dfkd_dist.config.kd3 import KD3Spec
from dfkd_dist.config.mosaic import MosaicSpec
from dfkd_dist.config.networks import ImageSpec, StudentSpec, TeacherSpec
from dfkd_dist.config.objectives import AnyObjectiveSpec, ObjectiveSpec
from dfkd_dist.config.streams import StreamSpec
from dfkd_dist.config.training import (
    CheckpointSpec,
    LogSpec,
    MeshSpec,
    OptimizerSpec,
    PrecisionSpec,
    RoundsSpec,
    ScheduleSpec,
)


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
    source: Annotated[
        GenerativeSpec | MosaicSpec | LabelledSpec | StreamSpec | InversionSpec, Field(discriminator="kind")
    ]
    objective: AnyObjectiveSpec = ObjectiveSpec()
    compensation: KDCISpec | None = None
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
        if self.rounds.student_steps == "epoch" and not isinstance(self.source, StreamSpec):
            raise ValueError(
                f"rounds.student_steps is 'epoch', but source.kind is {self.source.kind}; allowed there: a number"
            )
        if isinstance(self.source, GenerativeSpec):
            self._check_data_free()
            self._check_warmup(self.source)
            if isinstance(self.source, MosaicSpec):
                self.source.check_size(self.image.size)
        elif isinstance(self.source, InversionSpec):
            self._check_inversion(self.source)
        else:
            self._check_real()
        self._check_compensation()
        self.objective.check_recipe(teachers=len(self.teachers), source=self.source.kind, batch=self.batch)
        return self

    def _check_compensation(self) -> None:
        spec = self.compensation
        if spec is None:
            return
        if not self.teachers:
            raise ValueError("compensation needs teachers, whose logits its dictionary is made of")
        if isinstance(self.objective, KD3Spec) and not self.objective.compares_predictions:
            raise ValueError(
                "compensation corrects predictions, and objective.kind: kd3 with a shared classifier compares none; "
                "allowed: objective.classifier: hard or soft, or no compensation"
            )
        if spec.source is not None:
            raise ValueError("compensation.source is not supported yet; allowed: null (the teachers' own logits)")
        if spec.size > self.batch:
            raise ValueError(f"compensation.size is {spec.size}, but a batch has only {self.batch} images to cluster")

    def _check_real(self) -> None:
        crop = self.source.crop if isinstance(self.source, LabelledSpec) else None
        if crop is not None and crop != self.image.size:
            raise ValueError(f"source.crop is {crop}, but image.size is {self.image.size}; allowed: the same")
        if self.rounds.warmup:
            raise ValueError(
                f"rounds.warmup is {self.rounds.warmup}; a {self.source.kind} source has no warm-up (allowed: 0)"
            )
        if isinstance(self.source, StreamSpec) and not self.teachers:
            raise ValueError("teachers: at least one is needed by source.kind: stream")
        if not self.teachers:
            self._check_labelled()

    def _check_labelled(self) -> None:
        weights = self.objective.weights()
        if not weights.get("ce") or any(v for k, v in weights.items() if k != "ce"):
            raise ValueError(
                "source.kind: labelled without teachers trains from labels: it needs objective.ce > 0 and no other "
                "objective weight"
            )

    def _check_data_free(self) -> None:
        if not self.teachers:
            raise ValueError("teachers: at least one is needed by source.kind: generative")
        if self.objective.weights().get("ce"):
            raise ValueError("objective.ce needs labels (source.kind: labelled, or stream)")
        if self.batch < len(self.teachers):
            raise ValueError(f"batch is {self.batch}, fewer than the {len(self.teachers)} teachers")

    def _check_inversion(self, source: InversionSpec) -> None:
        if not self.teachers:
            raise ValueError("teachers: at least one is needed by source.kind: inversion")
        if self.rounds.warmup and not any(source.synthesis.loss.warmup_weights().values()):
            raise ValueError(
                f"rounds.warmup is {self.rounds.warmup}, but without the student every weight of "
                "source.synthesis.loss is 0; set rounds.warmup: 0"
            )
        source.check_size(self.image.size)

    def _check_warmup(self, source: GenerativeSpec) -> None:
        warmup = self.rounds.warmup
        if source.freeze_after_warmup and warmup == 0:
            raise ValueError("source.freeze_after_warmup: true needs rounds.warmup > 0, or no generator ever trains")
        if warmup and not any(source.warmup_weights().values()):
            raise ValueError(
                f"rounds.warmup is {warmup}, but every weight of the warm-up is 0; "
                "give source.warmup_loss, or set rounds.warmup: 0"
            )
