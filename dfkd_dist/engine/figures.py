"""Pictures of a run: grids of generated images (DFMF Figs. 2 and 3) and curves of its metrics (Fig. 4)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid

from dfkd_dist.data.pixels import to_uint8
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.trackers import METRICS, read_metrics
from dfkd_dist.sources.generative import GenerativeSource
from dfkd_dist.sources.inversion import InversionSource

log = logging.getLogger(__name__)

GRIDS, CURVES = "grids", "curves"
PER_ROW, PADDING, GAP = 8, 2, 12
"""Images in a row, pixels between images, pixels between generated and real ones."""
DISAGREEMENTS = {"D(T,S)": "-", "D(T,A)": "--"}
"""Teacher against student, teacher against assistant, and how their curves are drawn."""


def grid(images_NCHW: Tensor, per_row: int = PER_ROW) -> Tensor:
    """Images in image space as one picture, uint8 `[3, height, width]`, row by row on white."""
    pixels = to_uint8(images_NCHW.detach().cpu())
    return make_grid(pixels, nrow=per_row, padding=PADDING, pad_value=255)


def beside(left_3HW: Tensor, right_3HW: Tensor) -> Tensor:
    """Two pictures side by side on white; the lower one is filled up below."""
    height = max(left_3HW.shape[1], right_3HW.shape[1])
    width = left_3HW.shape[2] + GAP + right_3HW.shape[2]
    whole = torch.full((3, height, width), 255, dtype=torch.uint8)
    whole[:, : left_3HW.shape[1], : left_3HW.shape[2]] = left_3HW
    whole[:, : right_3HW.shape[1], -right_3HW.shape[2] :] = right_3HW
    return whole


def save_png(path: Path, picture_CHW: Tensor) -> None:
    """Write a uint8 picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(encode_png(picture_CHW).numpy().tobytes())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_grids(
    build: Build, folder: Path, moment: str, real: Mapping[str, Tensor] | None = None, count: int = 64
) -> None:
    """One picture per teacher, `grids/MOMENT/TEACHER.png`; every rank may call it, one of each row writes.

    The latents are the same at every call, so pictures of two moments can be compared image by image.

    Args:
        build: the run; without generators or a pool there is nothing to draw.
        folder: the run's directory.
        moment: such as `warmup` or `end`.
        real: images `[N, C, H, W]` in image space by teacher, to be shown at the right.
        count: images of each generator, or the newest in the pool of each teacher.
    """
    if isinstance(build.source, InversionSource) and build.mesh.row.rank == 0:
        for k, synthesiser in zip(build.mesh.teachers, build.source.synthesisers, strict=True):
            _save_grid(folder, moment, synthesiser.bench.name, build.source.newest(k, count), real)
    if not isinstance(build.source, GenerativeSource) or build.mesh.row.rank != 0:
        return
    for kit in build.source.kits:
        _save_grid(folder, moment, kit.teacher.name, build.source.sample(kit, count), real)


def _save_grid(folder: Path, moment: str, name: str, images_NCHW: Tensor, real: Mapping[str, Tensor] | None) -> None:
    picture = grid(images_NCHW)
    if real is not None and name in real:
        picture = beside(picture, grid(real[name]))
    save_png(folder / GRIDS / moment / f"{name}.png", picture)


def save_curves(folder: Path) -> list[Path]:
    """Draw what `metrics.jsonl` of a run holds; returns what was written. Call it on rank 0 only.

    `curves/disagreement.png`: D(T,S) and D(T,A) of every generator against rounds. `curves/accuracy.png`: accuracies
    in percent against rounds. Without matplotlib nothing is drawn, and the log says how to install it.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = list(read_metrics(path))
    names = list(dict.fromkeys(name for line in lines for name in line))
    groups = {
        "disagreement": ([n for n in names if n.rpartition("/")[2] in DISAGREEMENTS], "disagreement"),
        "accuracy": ([n for n in names if n.startswith(("val/", "test/"))], "accuracy (%)"),
    }
    wanted = {title: group for title, group in groups.items() if group[0]}
    if wanted and not _has_matplotlib():
        log.info("no curves: matplotlib is not installed (pip install 'dfkd-dist[plots]')")
        return []
    return [_draw(folder / CURVES / f"{t}.png", series(lines, shown), label) for t, (shown, label) in wanted.items()]


def series(lines: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Rounds and values of each metric, where it was measured and finite."""
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in names}
    for line in lines:
        for name in names:
            if line.get(name) is not None:
                found[name][0].append(line["round"])
                found[name][1].append(line[name])
    return found


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _draw(path: Path, curves: Mapping[str, tuple[list[int], list[float]]], label: str) -> Path:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    subjects = list(dict.fromkeys(_subject(name) for name in curves))
    for name, (rounds, values) in curves.items():
        style = DISAGREEMENTS.get(name.rpartition("/")[2], "-")
        axes.plot(rounds, values, style, color=f"C{subjects.index(_subject(name))}", label=name, marker=".")
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _subject(name: str) -> str:
    """What shares a colour: the generator for disagreements, else the metric itself."""
    owner, _, last = name.rpartition("/")
    return owner if last in DISAGREEMENTS else name
