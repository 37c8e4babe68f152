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

from dfkd_dist.config import Recipe, Spec, dump
from dfkd_dist.parallel.mesh import Mesh

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"
PACKAGES = (
    "dfkd-dist",
    "torch",
    "torchvision",
    "numpy",
    "accelerate",
    "scikit-learn",
    "safetensors",
    "pydantic",
    "timm",
)

CHANGEABLE = (
    "mesh.rows",
    "checkpoint",
    "log",
    "evaluation",
    "out",
    "about",
    "source.reader.workers",
    "source.reader.prefetch",
    "source.reader.cache",
    "source.selection.cache",
)
"""Keys (and what is below them) that may differ when a run is resumed: they do not change what is learned."""

_ABSENT = "absent"


class RunDirError(ValueError):
    """The run directory cannot be used; the message says what to do."""


def check_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """The directory for this run, checked before any work and without writing anything. Call it on rank 0 only.

    Raises:
        RunDirError: it holds a run and neither flag was given; it cannot be written; the recipe differs on resume.
    """
    return check_folder(recipe.run_dir(), RECIPE, recipe, resume=resume, overwrite=overwrite)


def check_folder(path: Path, marker: str, spec: Spec, *, resume: bool, overwrite: bool) -> Path:
    """`check_run` for any directory that a recipe fills.

    Args:
        path: the directory.
        marker: the file in it that holds the recipe.
        spec: the recipe.
        resume: the directory may hold what the same recipe made.
        overwrite: it may hold what any recipe made.
    """
    try:
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise RunDirError(f"{path}: {existing} is a file, not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunDirError(f"{path}: {existing} is not writable")
        occupied = path.exists() and any(not _is_aside(entry) for entry in path.iterdir())
    except OSError as error:
        raise RunDirError(f"{path} cannot be looked into: {error.strerror} ({error.filename})") from error
    if occupied and not (resume or overwrite):
        raise RunDirError(f"{path} exists; give --resume to go on, --overwrite to start again, or out=OTHER")
    if occupied and overwrite and not (path / marker).is_file():
        raise RunDirError(f"{path} holds no {marker}, so it is not a run; --overwrite refuses to delete it")
    if occupied and resume:
        _same_recipe(path / marker, spec)
    return path


def create_run(path: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Make the directory; with `overwrite` an earlier run in it goes first, else such a run stays as it is.

    Call it on rank 0 only.

    Raises:
        RunDirError: it cannot be created.
    """
    create_folder(path, RECIPE, recipe, overwrite=overwrite, inside=CHECKPOINTS)


def create_folder(path: Path, marker: str, spec: Spec, *, overwrite: bool, inside: str = ".") -> None:
    """`create_run` for any directory that a recipe fills; `inside` is a folder to make in it."""
    try:
        if overwrite and path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        # First of all: a directory without a recipe is no run, and could be neither resumed nor overwritten.
        if not (path / marker).exists():
            _write_whole(path / marker, dump(spec))
        (path / inside).mkdir(exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{path} cannot be created: {error.strerror}") from error


def _same_recipe(file: Path, spec: Spec) -> None:
    try:
        before = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunDirError(f"{file} cannot be read, so --resume cannot check the recipe: {error}") from error
    now = _flat(yaml.safe_load(dump(spec)))
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k, _ABSENT) != now.get(k, _ABSENT)]
    changed = [k for k in differing if not any(k == free or k.startswith(f"{free}.") for free in CHANGEABLE)]
    if changed:
        shown = ", ".join(f"{k} (was {before.get(k, _ABSENT)!r}, now {now.get(k, _ABSENT)!r})" for k in changed)
        raise RunDirError(f"--resume with another recipe: {shown}; may differ: {', '.join(CHANGEABLE)}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; a list counts by position."""
    if not prefix and not isinstance(tree, dict):
        raise ValueError(f"expected a mapping, found {type(tree).__name__}")
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    nested = [_flat(value, f"{prefix}{key}.") for key, value in items]
    if not nested:
        return {prefix[:-1]: tree}
    return {key: value for part in nested for key, value in part.items()}


def _is_aside(path: Path) -> bool:
    """What `_write_whole` leaves behind when it is killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _write_whole(path: Path, text: str) -> None:
    """Written aside and renamed: a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def describe_run(path: Path, recipe: Recipe, mesh: Mesh) -> None:
    """Write the resolved recipe, package versions and the mesh into the run. Call it on rank 0 only."""
    _write_whole(path / RECIPE, dump(recipe))
    _write_whole(path / "versions.json", json.dumps(versions(), indent=1) + "\n")
    topology = mesh.topology
    names = [[recipe.teachers[k].name for k in row] for row in topology.teachers]
    layout = {"rows": topology.rows, "columns": topology.columns, "world_size": topology.world_size, "teachers": names}
    _write_whole(path / "mesh.json", json.dumps(layout, indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Python, platform and the packages that matter to numbers."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
