"""Labelled image sets, how they are dealt to parties, and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Channels, Count, CountOrZero, Fraction, NonNegative, Spec

PIXEL_KINDS = ("masks", "digits_on_photos")
"""Sets whose labels are those of pixels: for segmentation."""


class DatasetSpec(Spec):
    """A labelled image set; of the kinds in `PIXEL_KINDS` every pixel has a label, of the others every image."""

    kind: Literal["digits", "npz", "jpg_npz", "folder", "torchvision", "masks", "digits_on_photos", "ffcv"]
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
    classes: Annotated[list[str], Field(min_length=2, max_length=255)] | None = None
    """masks: the names of the classes, in the order of their labels."""
    labels: str | None = None
    """masks: the folder of the maps of labels beside `image`; null is `label`."""
    offset: CountOrZero | None = None
    """masks: the label of the first class; smaller ones, such as 0 for "unlabelled", are ignored. null is 0."""
    photos: str | None = None
    """digits_on_photos: the archive of photographs (`path` is that of the digits)."""

    @property
    def of_pixels(self) -> bool:
        """Whether every pixel has a label."""
        return self.kind in PIXEL_KINDS

    @model_validator(mode="after")
    def _keys_belong_to_kinds(self) -> DatasetSpec:
        if self.kind == "masks" and self.classes is None:
            raise ValueError("kind: masks needs `classes`, the names in the order of the labels")
        if self.kind == "digits_on_photos" and self.photos is None:
            raise ValueError("kind: digits_on_photos needs `photos`, the archive of photographs")
        own = {"classes": "masks", "labels": "masks", "offset": "masks", "photos": "digits_on_photos"}
        for key, kind in own.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} is a key of kind: {kind}, found kind: {self.kind}")
        return self

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
    crop: Count | None = None
    """Random windows of so many pixels (image.size) of larger images, new ones in each epoch; null: whole images."""

    @model_validator(mode="after")
    def _crop_fits_in_the_images(self) -> LabelledSpec:
        if self.crop is not None and self.crop > self.dataset.size:
            raise ValueError(f"crop is {self.crop}, but dataset.size is {self.dataset.size}; allowed: up to that")
        return self

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
    resized_crop: Fraction = 0.0
    """A rectangle of at least this part of the image's area (and at most all of it), its sides as 3:4 to 4:3, brought
    back to the image's size."""
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
