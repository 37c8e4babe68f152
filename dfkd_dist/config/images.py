"""Labelled image sets, how they are dealt to parties, and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Channels, Count, CountOrZero, Fraction, NonNegative, Spec


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


class EvaluationSpec(Spec):
    """A labelled set for reporting; never used to choose a checkpoint."""

    dataset: DatasetSpec
    batch: Count = 256
    every: CountOrZero = 0
    """Student accuracy every so many main rounds; 0 only at the end."""
    split: SplitSpec | None = None
    """The parties' split, to report accuracy on each party's frequent classes."""
