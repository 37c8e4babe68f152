"""`dfkd synthesize`: a pool made once, whole after any stop, distilled later as a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from dfkd_dist.cli import main
from dfkd_dist.config import ReaderSpec, Recipe, RecipeError, parse
from dfkd_dist.data.pixels import to_image_space
from dfkd_dist.data.pool import Pool
from dfkd_dist.data.pool_shards import TARGETS
from dfkd_dist.data.shards.manifest import MANIFEST, read_manifest
from dfkd_dist.data.shards.verify import verify
from dfkd_dist.data.stream.scan import chunks_of, scan
from dfkd_dist.engine import synthesize as making
from dfkd_dist.engine.build import build
from dfkd_dist.engine.rundir import RunDirError
from dfkd_dist.engine.synthesize import is_finished, recipe_of_pool, synthesize
from dfkd_dist.parallel.launch import LaunchFacts
from tests import recipes

Tree = dict[str, Any]
IMAGES = 2 * 7 * 3
ALONE = LaunchFacts()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    teachers = recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)
    changes: Tree = {
        "rounds": {"warmup": 0, "main": 3},
        "source": {"synthesis": {"loss": {"js": 0.0}}},
        "objective": {"vid": 1.0},
        "checkpoint": {"every": 1},
        "log": {"every": 1},
    }
    return recipes.inversion(teachers, **changes)


def make(tree: Tree, out: Path, **how: Any) -> tuple[int, dict[str, Any] | None]:
    return synthesize(parse(Recipe, tree), out, ALONE, device="cpu", **how)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_pool_is_a_set_of_shards_with_targets(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "pool"
    code, summary = make(tree, out)
    assert code == 0 and summary is not None and summary["images"] == IMAGES
    report = verify(out)
    assert (report.samples, report.findings, report.unlisted) == (IMAGES, [], [])
    manifest = read_manifest(out)
    assert manifest.classes == tuple(recipes.NAMES)
    assert summary["digest"] == manifest.digest and is_finished(out)
    assert {path.name for path in (out / "run").iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "sheet.png",
    }
    assert not (out / "run" / "checkpoints").exists() and not (out / "run" / "student.safetensors").exists()
    counts = [entry["images"] for entry in summary["balance"]["classes"]]
    assert sum(counts) == IMAGES and 0 <= summary["agreement"] <= 100


def test_targets_are_the_answers_about_the_images_as_stored(tree: Tree, tmp_path: Path) -> None:
    make(tree, tmp_path)
    manifest, recipe = read_manifest(tmp_path), parse(Recipe, tree)
    reader = ReaderSpec(shards=str(tmp_path), workers=0)
    seen = [*scan(manifest, reader, batch=16, size=8, channels=3, chunks=chunks_of(manifest, 16))]
    images_NCHW = torch.cat([batch.images_NCHW for batch in seen])
    built = build(recipe_of_pool(recipe, tmp_path / "other"), torch.device("cpu"))
    whole = to_image_space(images_NCHW, torch.float64)
    with safe_open(tmp_path / TARGETS, "pt") as facts:
        assert facts.metadata() == {"manifest": manifest.digest}
        logits_NKC, labels_N = facts.get_tensor("logits_NKC"), facts.get_tensor("labels_N")
    for k, teacher in enumerate(built.teachers):
        assert torch.allclose(teacher(whole).logits_NC, logits_NKC[:, k], atol=1e-9)
    assert labels_N.tolist() == manifest.labels_N.tolist()
    assert torch.bincount(labels_N).min() > 0


def test_a_stream_distils_it(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "pool"
    make(tree, out)
    student = {key: tree[key] for key in ("name", "method", "image", "num_classes", "teachers", "student", "precision")}
    reader = {"shards": str(out), "workers": 0}
    stream = {
        "source": {"kind": "stream", "reader": reader},
        "batch": 8,
        "rounds": {"main": 2, "student_steps": "epoch"},
    }
    built = build(parse(Recipe, student | stream | {"out": str(tmp_path / "run")}), torch.device("cpu"))
    built.trainer.fit()
    assert built.trainer.student.steps == 2 * (IMAGES // 8)


KILLS = [(Pool, "add"), (Pool, "finish"), (making, "save_sheet"), (making, "write_summary"), (Pool, "seal")]


@pytest.mark.parametrize(("owner", "name"), KILLS)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_costs_nothing(
    owner: Any, name: str, after: bool, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(tree, whole)
    original, calls = getattr(owner, name), []

    def killed(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) < (2 if name == "add" else 1):
            return original(*given, **named)
        if after:
            original(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, killed)
        make(tree, parts)
    assert is_finished(parts) == (name == "seal" and after)
    code, summary = make(tree, parts, resume=True)
    assert code == 0 and summary is not None
    assert files(whole) == files(parts)
    assert not (parts / "run" / "checkpoints").exists()


def test_a_finished_pool_is_left_alone(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pool"
    _, made = make(tree, out)
    before = files(out)
    with pytest.raises(RunDirError, match="give --resume"):
        make(tree, out)
    with pytest.raises(RunDirError, match="another recipe: seed"):
        make(tree | {"seed": 1}, out, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(making, "run", lambda *_: pytest.fail("it ran again"))
        code, summary = make(tree, out, resume=True)
    assert code == 0 and summary == made and files(out) == before
    make(tree, out, overwrite=True)
    assert files(out) == before


def test_what_cannot_be_a_pool_is_refused(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="source.kind is generative; allowed for a pool: inversion"):
        make(recipes.dfq(recipes.random_teachers(1)), tmp_path / "a")
    against = recipes.merged(tree, {"source": {"synthesis": {"loss": {"js": 1.0}}}})
    with pytest.raises(RecipeError, match=r"source.synthesis.loss.js: the images play against the student"):
        make(against, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_command(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "{pool}"
    path.write_text(yaml.safe_dump(tree))
    assert main(["synthesize", str(path), "--out", str(out), "--device", "cpu", "rounds.main=1"]) == 0
    said = capsys.readouterr().out
    assert "14 images" in said and "evenness" in said
    assert json.loads((out / "run" / "summary.json").read_text())["images"] == 14
    assert main(["shards", "verify", str(out), "--workers", "1"]) == 0
    assert main(["synthesize", str(path), "--out", str(out), "--device", "cpu", "rounds.main=1"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (out / MANIFEST).is_file()
