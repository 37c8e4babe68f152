"""The image space of a run, its teachers and its student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dfkd_dist.config.base import Channels, Count, Positive, Spec


class ImageSpec(Spec):
    """The canonical image space of a run: `[N, channels, size, size]`, nominally in [0, 1]."""

    size: Annotated[int, Field(ge=4, le=1024)]
    channels: Channels


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
