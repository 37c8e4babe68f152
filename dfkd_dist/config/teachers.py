"""The schema of `dfkd teachers train`: private teachers from one labelled set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, OutDir, Positive, Spec
from dfkd_dist.config.images import AugmentSpec, DatasetSpec, SplitSpec
from dfkd_dist.config.training import OptimizerSpec, PrecisionSpec, ScheduleSpec


class TeachersRecipe(Spec):
    """`dfkd teachers train`: private teachers (and, if asked, the gold standard) from one labelled set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    seed: CountOrZero = 0
    out: OutDir = "runs/teachers/{name}"
    dataset: DatasetSpec
    crop: Count | None = None
    """They learn from random windows of so many pixels of larger images (segmentation); null: from whole images."""
    split: SplitSpec
    archs: Annotated[list[str], Field(min_length=1)]
    """One per party, or one for all."""
    gold: str | None = None
    """A network trained on all the data (the gold standard), under the name `gold`."""
    pretrained: bool = False
    mean: list[float] | None = None
    std: list[Positive] | None = None
    """Input normalisation of all of them; null measures each party's own images."""
    epochs: Count
    batch: Count = 256
    optimizer: OptimizerSpec = OptimizerSpec(lr=0.1, nesterov=True, weight_decay=5e-4)
    schedule: ScheduleSpec = ScheduleSpec(kind="multistep", milestones=[0.4, 0.6])
    augment: AugmentSpec = AugmentSpec()
    precision: PrecisionSpec = PrecisionSpec()

    @model_validator(mode="after")
    def _one_arch_each(self) -> TeachersRecipe:
        if len(self.archs) not in (1, self.split.parties):
            raise ValueError(f"archs: give 1 or split.parties ({self.split.parties}) names, got {len(self.archs)}")
        return self

    @model_validator(mode="after")
    def _whole_normalisation(self) -> TeachersRecipe:
        lengths = [len(values) if values is not None else None for values in (self.mean, self.std)]
        if lengths not in ([None] * 2, [self.dataset.channels] * 2):
            raise ValueError(f"mean and std: give neither, or {self.dataset.channels} values each (dataset.channels)")
        return self

    def out_dir(self) -> Path:
        """The directory the weights go to."""
        return Path(self.out.format(name=self.name, seed=self.seed))
