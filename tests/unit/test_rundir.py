"""Run directories: what is refused, what the refusal says, and that it leaves no trace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfkd_dist.config import Recipe, load_recipe, parse
from dfkd_dist.engine import rundir
from dfkd_dist.engine.checkpoint import CheckpointError
from dfkd_dist.engine.run import run
from dfkd_dist.engine.rundir import RunDirError, check_run, create_run
from dfkd_dist.parallel.launch import LaunchFacts
from dfkd_dist.parallel.mesh import make_mesh
from dfkd_dist.parallel.topology import make_topology
from tests import recipes

Tree = dict[str, Any]


def recipe(out: Path, **changes: Any) -> Recipe:
    small = {"log": {"grids": False}, "rounds": {"warmup": 0, "main": 1}}
    tree = recipes.merged(recipes.dfmf(recipes.random_teachers(2), **small), changes)
    return parse(Recipe, tree | {"out": str(out)})


def start(given: Recipe, **flags: bool) -> int:
    return run(given, LaunchFacts(), device="cpu", **flags)[0]


def make(given: Recipe) -> Path:
    """A run that has begun, as far as its directory goes."""
    create_run(given.run_dir(), given, overwrite=False)
    return given.run_dir()


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: time of change and content."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Checked at the end: nothing below tmp_path differs from when this was called."""
    before: list[dict[str, tuple[int, bytes]]] = []
    yield lambda: before.append(listing(tmp_path))
    assert before and listing(tmp_path) == before[0]


NEITHER: dict[str, bool] = {"resume": False, "overwrite": False}
RESUME: dict[str, bool] = {"resume": True, "overwrite": False}
OVERWRITE: dict[str, bool] = {"resume": False, "overwrite": True}


# --------------------------------------------------------------------------------------------- refused


def test_an_existing_run_needs_a_word(tmp_path: Path, unchanged: Callable[[], None]) -> None:
    given = recipe(tmp_path / "run")
    make(given)
    unchanged()
    with pytest.raises(RunDirError, match="run exists; give --resume to go on, --overwrite to start again"):
        start(given)


def test_overwrite_deletes_nothing_that_is_no_run(tmp_path: Path, unchanged: Callable[[], None]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    unchanged()
    with pytest.raises(RunDirError, match=r"holds no recipe.yaml, so it is not a run; --overwrite refuses"):
        start(recipe(tmp_path / "thesis"), overwrite=True)


@pytest.mark.parametrize("flags", [NEITHER, RESUME, OVERWRITE])
@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_in_the_way(flags: dict[str, bool], below: str, tmp_path: Path, unchanged: Callable[[], None]) -> None:
    (tmp_path / "run").write_text("a file")
    unchanged()
    with pytest.raises(RunDirError, match="run is a file, not a directory"):
        start(recipe(tmp_path / "run" / below), **flags)


@pytest.mark.parametrize("flags", [NEITHER, RESUME, OVERWRITE])
def test_a_place_where_nobody_can_write(flags: dict[str, bool]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, where not even root can make a directory")
    with pytest.raises(RunDirError, match="/proc/dfkd_run.*(not writable|cannot be created)"):
        start(recipe(Path("/proc/dfkd_run")), **flags)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RunDirError, match="closed is not writable"):
        check_run(recipe(tmp_path / "closed" / "run"), **NEITHER)
    (tmp_path / "sealed").mkdir(mode=0o000)
    with pytest.raises(RunDirError, match="sealed"):
        check_run(recipe(tmp_path / "sealed" / "a" / "run"), **NEITHER)


def test_a_read_only_file_system(tmp_path: Path) -> None:
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounting.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounting.stderr.decode().strip()}")
    try:
        with pytest.raises(RunDirError, match="is not writable"):
            check_run(recipe(tmp_path / "run"), **NEITHER)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr (was 0.02, now 0.5)"),
        ({"source": {"loss": {"adv": 0.25}}}, "source.loss.adv (was 1.0, now 0.25)"),
        ({"seed": 3, "batch": 13}, "batch (was 11, now 13), seed (was 0, now 3)"),
        ({"mesh": {"sync": "local"}}, "mesh.sync (was 'global', now 'local')"),
        ({"teachers": recipes.random_teachers(3)}, "teachers.2.arch (was 'absent', now 'tiny')"),
    ],
)
def test_resuming_with_another_recipe_names_the_keys(
    changes: Tree, named: str, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    make(recipe(tmp_path / "run"))
    unchanged()
    with pytest.raises(RunDirError) as refused:
        start(recipe(tmp_path / "run", **changes), resume=True)
    assert f"--resume with another recipe: {named}" in str(refused.value)
    assert "may differ: mesh.rows, checkpoint, log, evaluation, out, about, " in str(refused.value)


@pytest.mark.parametrize("content", ["[1, 2]", "", "a: [", None])
def test_resuming_where_the_recipe_cannot_be_read(
    content: str | None, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    path = make(recipe(tmp_path / "run"))
    if content is None:
        (path / "recipe.yaml").unlink()
    else:
        (path / "recipe.yaml").write_text(content)
    unchanged()
    with pytest.raises(RunDirError, match=r"recipe.yaml cannot be read, so --resume cannot check"):
        start(recipe(tmp_path / "run"), resume=True)


@pytest.mark.parametrize("flags", [NEITHER, RESUME, OVERWRITE])
def test_what_is_wrong_elsewhere_leaves_no_trace(
    flags: dict[str, bool], tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    """A teacher's file is missing: neither is a new directory made nor an old run deleted."""
    missing = [{"name": "t0", "weights": str(tmp_path / "absent.safetensors"), "arch": "tiny", "mean": [0.5] * 3}]
    given = recipe(tmp_path / "run", teachers=[missing[0] | {"std": [0.25] * 3}])
    if flags is not NEITHER:
        make(given)
    unchanged()
    with pytest.raises(ValueError, match=r"absent\.safetensors"):
        start(given, **flags)


def test_resuming_where_no_checkpoint_is_whole(tmp_path: Path, unchanged: Callable[[], None]) -> None:
    given = recipe(tmp_path / "run")
    (make(given) / "checkpoints" / "round_00000001_0000").mkdir()
    unchanged()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: .*manifest.json is missing"):
        start(given, resume=True)


# -------------------------------------------------------------------------------------------- accepted


def test_what_does_not_change_learning_may_change(tmp_path: Path) -> None:
    make(recipe(tmp_path / "run"))
    changes: Tree = {"mesh": {"rows": 1}, "checkpoint": {"every": 7}, "log": {"every": 3}, "about": "other words"}
    assert check_run(recipe(tmp_path / "run", **changes), **RESUME) == tmp_path / "run"


@pytest.mark.parametrize("flags", [NEITHER, RESUME, OVERWRITE])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory_is_taken(flags: dict[str, bool], exists: bool, tmp_path: Path) -> None:
    given = recipe(tmp_path / "runs" / "new")
    if exists:
        given.run_dir().mkdir(parents=True)
    path = check_run(given, **flags)
    assert path.exists() == exists
    create_run(path, given, overwrite=flags["overwrite"])
    assert sorted(os.listdir(path)) == ["checkpoints", "recipe.yaml"]
    assert load_recipe(path / "recipe.yaml", []) == given


def test_a_run_can_be_resumed_and_overwritten_from_its_first_file_on(tmp_path: Path) -> None:
    """Killed at any moment while its directory was made, a run is either not there or can be resumed."""
    given = recipe(tmp_path / "run")
    given.run_dir().mkdir()
    (given.run_dir() / ".recipe.yaml.123.tmp").write_text("name: te")
    for flags in (NEITHER, RESUME, OVERWRITE):
        check_run(given, **flags)
    create_run(given.run_dir(), given, overwrite=False)
    (given.run_dir() / "checkpoints").rmdir()
    for flags in (RESUME, OVERWRITE):
        check_run(given, **flags)


def test_overwrite_starts_from_nothing(tmp_path: Path) -> None:
    given = recipe(tmp_path / "run", precision={"train": "fp32", "teacher": "fp32"})
    assert start(given) == 0
    (tmp_path / "run" / "stray").write_text("of the earlier run")
    assert start(given, overwrite=True) == 0
    left = set(os.listdir(tmp_path / "run"))
    assert "stray" not in left
    assert {"recipe.yaml", "versions.json", "mesh.json", "checkpoints", "student.safetensors", "summary.json"} <= left


def test_what_reproduces_a_run_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(tmp_path / "run")
    path, mesh = make(given), make_mesh(make_topology(1, [1.0, 1.0], None), None)  # type: ignore[arg-type]
    rundir.describe_run(path, given, mesh)
    before = listing(path)

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rundir.describe_run(path, recipe(tmp_path / "run", about="other words"), mesh)
    assert listing(path) == before
    assert yaml.safe_load((path / "recipe.yaml").read_text())["about"] == ""
