"""A network on disk: `NAME.safetensors`, and beside it `NAME.json`, which says how to build and feed it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.weights import WeightsError, load_weights, save_weights


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
    """

    arch: str
    num_classes: int
    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    frequent: Sequence[int] | None = None

    def build(self, pretrained: bool = False) -> nn.Module:
        """A fresh network of this kind."""
        return build_network(self.arch, num_classes=self.num_classes, in_channels=self.channels, pretrained=pretrained)

    def preprocess(self) -> Preprocess:
        """From image space to its input."""
        return Preprocess(self.size, self.channels, self.mean, self.std)


def read_card(weights: str | Path) -> dict[str, Any]:
    """What the JSON beside a weights file says; empty where there is none.

    Raises:
        WeightsError: the JSON is damaged or has unknown keys.
    """
    path = Path(weights).with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON: {error}") from error
    known = {f.name for f in fields(Card)} | {"about"}
    unknown = sorted(set(content) - known) if isinstance(content, dict) else ["(not a mapping)"]
    if unknown:
        raise WeightsError(f"{path}: unknown keys {unknown}; allowed: {sorted(known)}")
    return {key: value for key, value in content.items() if key != "about"}


def save_network(path: str | Path, state: dict[str, Tensor], card: Card, about: dict[str, Any] | None = None) -> None:
    """Write weights and card; `about` is free text for people and tools (accuracy, method)."""
    target = Path(path).with_suffix(".safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(state, target, {"arch": card.arch})
    target.with_suffix(".json").write_text(json.dumps({**asdict(card), "about": about or {}}, indent=2) + "\n")


def load_network(path: str | Path) -> ImageNetwork:
    """A network written by `save_network`, in eval mode: images `[N, C, H, W]` in [0, 1] to signals.

    Raises:
        WeightsError: a file is missing or does not fit.
    """
    target = Path(path).with_suffix(".safetensors")
    found = read_card(target)
    if not found:
        raise WeightsError(f"{target.with_suffix('.json')}: no such file; it must stand beside the weights")
    card = Card(**found)
    network = card.build()
    load_weights(network, target)
    return ImageNetwork(network, card.preprocess(), target.stem).eval()
