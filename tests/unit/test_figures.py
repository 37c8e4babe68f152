"""Grids of images and curves of metrics."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import decode_png, read_file

from dfkd_dist.config import Recipe, parse
from dfkd_dist.data.pixels import to_uint8
from dfkd_dist.engine import figures
from dfkd_dist.engine.build import build
from dfkd_dist.engine.trackers import METRICS
from tests.recipes import base, dfmf, random_teachers


def read(path: Path) -> torch.Tensor:
    return decode_png(read_file(str(path)))


def test_a_grid_shows_every_pixel() -> None:
    images = torch.rand(5, 3, 4, 4)
    picture = figures.grid(images, per_row=3)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 2 + 2 * 6, 2 + 3 * 6)
    for n in range(5):
        top, left = 2 + 6 * (n // 3), 2 + 6 * (n % 3)
        assert torch.equal(picture[:, top : top + 4, left : left + 4], to_uint8(images[n : n + 1])[0])


def test_grey_images_become_grey_pictures() -> None:
    picture = figures.grid(torch.rand(2, 1, 4, 4))
    assert picture.shape[0] == 3 and torch.equal(picture[0], picture[2])


def test_pictures_stand_side_by_side() -> None:
    left, right = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.ones(3, 6, 2, dtype=torch.uint8)
    whole = figures.beside(left, right)
    assert whole.shape == (3, 6, 5 + figures.GAP + 2)
    assert torch.equal(whole[:, :4, :5], left) and torch.equal(whole[:, :, -2:], right)
    assert bool((whole[:, 4:, :5] == 255).all()) and bool((whole[:, :, 5:-2] == 255).all())


def test_every_teacher_gets_its_picture(tmp_path: Path) -> None:
    one = build(parse(Recipe, dfmf(random_teachers(2))), torch.device("cpu"))
    figures.save_grids(one, tmp_path, "warmup", count=10)
    figures.save_grids(one, tmp_path, "end", real={"t1": torch.rand(10, 3, 8, 8)}, count=10)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {f"grids/{moment}/{name}.png" for moment in ("warmup", "end") for name in ("t0", "t1")}
    first, second = read(tmp_path / "grids/warmup/t0.png"), read(tmp_path / "grids/end/t0.png")
    assert torch.equal(first, second)  # the same latents and, here, the same weights
    assert torch.equal(first, figures.grid(one.source.sample(one.source.kits[0], 10)))  # type: ignore[attr-defined]
    wide = read(tmp_path / "grids/end/t1.png")
    assert wide.shape[2] == 2 * first.shape[2] + figures.GAP


def test_without_generators_nothing_is_drawn(tmp_path: Path) -> None:
    tree = base([], objective={"kl": 0.0, "ce": 1.0}, rounds={"warmup": 0}, num_classes=10)
    tree["source"] = {"kind": "labelled", "dataset": {"kind": "digits", "size": 8, "channels": 3}}
    figures.save_grids(build(parse(Recipe, tree), torch.device("cpu")), tmp_path, "end")
    assert list(tmp_path.iterdir()) == []


LINES: list[dict[str, Any]] = [
    {"round": 1, "generator/a/D(T,S)": 0.5, "generator/a/D(T,A)": 0.25, "student/kl": 3.0},
    {"round": 2, "generator/a/D(T,S)": None, "generator/b/D(T,S)": 0.75},
    {"round": 3, "generator/a/D(T,S)": 1.0, "test/student": 50.0},
]


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_series_are_what_was_measured() -> None:
    found = figures.series(LINES, ["generator/a/D(T,S)", "test/student"])
    assert found == {"generator/a/D(T,S)": ([1, 3], [0.5, 1.0]), "test/student": ([3], [50.0])}


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_lines(tmp_path, LINES)
    assert figures.save_curves(tmp_path) == [tmp_path / "curves" / f"{t}.png" for t in ("disagreement", "accuracy")]
    for path in (tmp_path / "curves").iterdir():
        picture = read(path)
        assert picture.shape[1] > 300 and len(picture.flatten(1).unique(dim=1).T) > 10


@pytest.mark.parametrize("lines", [None, [], [{"round": 1, "student/kl": 3.0}]])
def test_nothing_to_draw(tmp_path: Path, lines: list[dict[str, Any]] | None) -> None:
    if lines is not None:
        write_lines(tmp_path, lines)
    assert figures.save_curves(tmp_path) == [] and not (tmp_path / "curves").exists()


def test_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path, LINES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO):
        assert figures.save_curves(tmp_path) == []
    assert "pip install 'dfkd-dist[plots]'" in caplog.text
