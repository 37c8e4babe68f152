"""The student on disk: safetensors with a card, and ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_dist.config import ImageSpec
from dfkd_dist.engine.build import Build
from dfkd_dist.models.cards import load_network, save_network

STUDENT = "student.safetensors"
"""The student's file in a run's directory."""

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
"""Names in the ONNX graph."""
OPSET = 20


def export_student(build: Build, path: Path, about: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the student alone (no heads of objectives) as `NAME.safetensors` and `NAME.json`; call it on rank 0 only.

    Its batch norms are stored as plain ones, and numbers in fp32. `dfkd_dist.load_student` reads it.

    Args:
        build: the run, trained.
        path: where to; the suffix is set.
        about: shown to people and tools in the card; the accuracy, method, name and seed are taken from it.

    Returns:
        What was written: the weights, then the card.
    """
    state = build.side.network.network.state_dict()
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    save_network(path, state, build.student_card, _about(about or {}))
    return [path.with_suffix(".safetensors"), path.with_suffix(".json")]


def _about(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The few facts of a summary that belong beside weights."""
    found = {key: summary[key] for key in ("name", "method", "seed", "rounds") if key in summary}
    student = summary.get("student", {})
    return found | {key: student[key] for key in ("accuracy", "miou") if student.get(key) is not None}


def export_onnx(path: Path, out: Path, image: ImageSpec) -> Path:
    """Write a saved network as ONNX: images `[batch, C, size, size]` in [0, 1] to logits, for any batch size.

    Resizing, channels and normalisation are inside the graph.

    Args:
        path: a network written by `export_student` (or `save_network`).
        out: the ONNX file; written whole or not at all.
        image: size and channels of the images that it will be given.

    Raises:
        ImportError: the extra is not installed (says how to install it).
        WeightsError: the network cannot be read.
    """
    onnx = _onnx()
    loaded = load_network(path)
    # The two halves without the hooks between them.
    whole = nn.Sequential(loaded.preprocess, loaded.network).eval()
    example = torch.zeros(2, image.channels, image.size, image.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        torch.onnx.export(
            whole,
            (example,),
            str(aside),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        onnx.checker.check_model(str(aside))
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return out


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs {error.name}, which is not installed: pip install 'dfkd-dist[onnx]'"
        ) from error
    return onnx
