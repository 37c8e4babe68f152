"""Distributed data-free knowledge distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfkd_dist.models.network import ImageNetwork

__all__ = ["load_student"]


def load_student(path: str | Path) -> ImageNetwork:
    """A student that a run exported, in eval mode: `student(images).logits_NC` for images `[N, C, H, W]` in [0, 1].

    Args:
        path: `student.safetensors`, with `student.json` beside it.

    Raises:
        WeightsError: a file is missing, damaged or does not fit.
    """
    from dfkd_dist.models.cards import load_network  # here, so that `import dfkd_dist` is quick

    return load_network(path)
