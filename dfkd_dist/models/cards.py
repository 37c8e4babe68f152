"""A network on disk: `NAME.safetensors`, and beside it `NAME.json`, which says how to build and feed it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.shared_classifier import project
from dfkd_dist.models.weights import WeightsError, load_weights, save_weights

Check = Callable[[Any], bool]


def _listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(check(item) for item in value)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


VALUES: dict[str, tuple[str, Check]] = {
    "arch": ("a network's name", lambda value: isinstance(value, str)),
    "num_classes": ("a number of at least 1", _count),
    "size": ("a number of at least 1", _count),
    "channels": ("1 or 3", lambda value: type(value) is int and value in (1, 3)),
    "mean": ("a list of numbers", _listed(_number)),
    "std": ("a list of numbers", _listed(_number)),
    "classes": ("a list of names, or null", _or_null(_listed(lambda item: isinstance(item, str)))),
    "frequent": ("a list of class numbers, or null", _or_null(_listed(lambda item: type(item) is int and item >= 0))),
    "features": ("a number of at least 1, or null", _or_null(_count)),
    "about": ("a mapping", lambda value: isinstance(value, dict)),
}
"""What a card's JSON may say, in words and as a check."""


@dataclass(frozen=True)
class Card:
    """How to build a network and how it wants its images.

    Args:
        arch: its name in `models.registry`.
        num_classes: C.
        size: side of its input in pixels.
        channels: 1 or 3.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        classes: class names in the order of its logits, or None.
        frequent: classes its party had plenty of (DFMF's IBL split), or None.
        features: width of its classifier's input, where a projector stands before it (a student in front of a
            teacher's classifier); None where the network is as its name says.
    """

    arch: str
    num_classes: int
    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    frequent: Sequence[int] | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        """Refuse a normalisation that does not fit the channels (ValueError names the key)."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise ValueError(f"{name}: expected {self.channels} values (its channels), found {list(values)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive values, found {list(self.std)}")

    def build(self, pretrained: bool = False) -> nn.Module:
        """A fresh network of this kind."""
        network = build_network(
            self.arch, num_classes=self.num_classes, in_channels=self.channels, pretrained=pretrained
        )
        if self.features is not None:
            project(network, self.features, torch.zeros(2, self.channels, self.size, self.size))
        return network

    def preprocess(self, canonical: int | None = None) -> Preprocess:
        """From image space to its input; `canonical` is the side of a run's images, null the network's own."""
        return Preprocess(self.size, self.channels, self.mean, self.std, canonical)


def read_card(weights: str | Path) -> dict[str, Any]:
    """What the JSON beside a weights file says about the network; empty where there is none.

    Raises:
        WeightsError: the JSON is damaged, has unknown keys, or values that cannot be.
    """
    return {key: value for key, value in _content(Path(weights).with_suffix(".json")).items() if key != "about"}


def read_about(weights: str | Path) -> dict[str, Any]:
    """The `about` of `save_network`; empty where there is none. Raises as `read_card`."""
    return dict(_content(Path(weights).with_suffix(".json")).get("about", {}))


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected keys and values, found a {type(content).__name__}")
    unknown = sorted(set(content) - set(VALUES))
    if unknown:
        raise WeightsError(f"{path}: unknown keys {unknown}; allowed: {sorted(VALUES)}")
    wrong = [key for key, value in content.items() if not VALUES[key][1](value)]
    if wrong:
        told = "; ".join(f"{key} must be {VALUES[key][0]}, found {content[key]!r}" for key in wrong)
        raise WeightsError(f"{path}: {told}")
    return content


def save_network(path: str | Path, state: dict[str, Tensor], card: Card, about: dict[str, Any] | None = None) -> None:
    """Write weights, then the card, each whole or not at all; `about` is for people and tools (accuracy, method)."""
    target = Path(path).with_suffix(".safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(state, target, {"arch": card.arch})
    aside = target.with_name(f".{target.stem}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps({**asdict(card), "about": about or {}}, indent=2) + "\n")
        os.replace(aside, target.with_suffix(".json"))
    finally:
        aside.unlink(missing_ok=True)


def load_network(path: str | Path) -> ImageNetwork:
    """A network written by `save_network`, in eval mode: images `[N, C, H, W]` in [0, 1] to signals.

    Raises:
        WeightsError: a file is missing or does not fit.
    """
    target = Path(path).with_suffix(".safetensors")
    found = read_card(target)
    if not found:
        raise WeightsError(f"{target.with_suffix('.json')}: no such file; it must stand beside the weights")
    missing = sorted({"arch", "num_classes", "size", "channels", "mean", "std"} - set(found))
    if missing:
        raise WeightsError(f"{target.with_suffix('.json')}: {', '.join(missing)} not given")
    try:
        card = Card(**found)
        network = card.build()
    except ValueError as error:
        raise WeightsError(f"{target.with_suffix('.json')}: {error}") from error
    load_weights(network, target)
    return ImageNetwork(network, card.preprocess(), target.stem).eval()
