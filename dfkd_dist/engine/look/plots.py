"""Figures by matplotlib, which is an extra."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

DPI = 120


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty figure without pyplot's global state or a window system.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: pip install 'dfkd-dist[plots]' ({error})") from error
    return Figure(figsize=inches, layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(aside, dpi=DPI, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
