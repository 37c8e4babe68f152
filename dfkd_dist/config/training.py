"""How a run trains: optimisers, schedules, rounds, the mesh, number formats, checkpoints and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, Fraction, NonNegative, Positive, Spec


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


class RoundsSpec(Spec):
    """How long a run is. One round is one outer iteration (one m of Algorithm 1's main loop)."""

    warmup: CountOrZero = 0
    """Rounds with generator steps only: N_warm-up x M."""
    main: Count
    """N x M."""
    student_steps: Count | Literal["epoch"] = 1
    """M_S: student steps in a main round; `epoch` is one pass over what a stream selected in this round."""

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
