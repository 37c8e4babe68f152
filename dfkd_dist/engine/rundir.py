"""A run's directory: refused where it would overwrite, filled with what reproduces the run."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dfkd_dist.config import Recipe, dump
from dfkd_dist.parallel.mesh import Mesh

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"
PACKAGES = ("dfkd-dist", "torch", "torchvision", "numpy", "accelerate", "scikit-learn", "safetensors", "pydantic", "timm")

CHANGEABLE = {"mesh", "checkpoint", "log", "evaluation", "out", "about"}
"""Keys that may differ when a run is resumed: they do not change what is learned."""


class RunDirError(ValueError):
    """The run directory cannot be used; the message says what to do."""


def check_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """The directory for this run, checked before any work and without writing anything. Call it on rank 0 only.

    Raises:
        RunDirError: it holds a run and neither flag was given; it cannot be written; the recipe differs on resume.
    """
    path = recipe.run_dir()
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise RunDirError(f"{path}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunDirError(f"{path}: {existing} is not writable")
    occupied = path.exists() and any(path.iterdir())
    if occupied and not (resume or overwrite):
        raise RunDirError(f"{path} exists; give --resume to go on, --overwrite to start again, or out=OTHER")
    if occupied and overwrite and not (path / RECIPE).is_file():
        raise RunDirError(f"{path} holds no {RECIPE}, so it is not a run; --overwrite refuses to delete it")
    if occupied and resume:
        _same_recipe(path, recipe)
    return path


def create_run(path: Path, *, overwrite: bool) -> None:
    """Make the directory; with `overwrite` an earlier run in it goes first. Call it on rank 0 only.

    Raises:
        RunDirError: it cannot be created.
    """
    try:
        if overwrite and path.exists():
            shutil.rmtree(path)
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{path} cannot be created: {error.strerror}") from error


def _same_recipe(path: Path, recipe: Recipe) -> None:
    try:
        before = yaml.safe_load((path / RECIPE).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RunDirError(f"{path / RECIPE} cannot be read, so --resume cannot check the recipe: {error}") from error
    now = yaml.safe_load(dump(recipe))
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in CHANGEABLE)
    if changed:
        shown = ", ".join(f"{k} (was {before.get(k)!r}, now {now.get(k)!r})" for k in changed)
        raise RunDirError(f"--resume with another recipe: {shown}; may differ: {', '.join(sorted(CHANGEABLE))}")


def describe_run(path: Path, recipe: Recipe, mesh: Mesh) -> None:
    """Write the resolved recipe, package versions and the mesh into the run. Call it on rank 0 only."""
    (path / RECIPE).write_text(dump(recipe))
    (path / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    topology = mesh.topology
    names = [[recipe.teachers[k].name for k in row] for row in topology.teachers]
    layout = {"rows": topology.rows, "columns": topology.columns, "world_size": topology.world_size, "teachers": names}
    (path / "mesh.json").write_text(json.dumps(layout, indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Python, platform and the packages that matter to numbers."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
