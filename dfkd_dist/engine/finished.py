"""What can be done with a run that is on disk: evaluate it on other data, export its student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dfkd_dist.config import DatasetSpec, Recipe, RecipeError, apply_override, load_recipe, parse
from dfkd_dist.data.datasets import Split
from dfkd_dist.engine import evaluate, export
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.rundir import CHECKPOINTS, RECIPE, RunDirError
from dfkd_dist.engine.state import RunState
from dfkd_dist.parallel.launch import LaunchFacts, join


def open_finished(run: Path, device: str = "cpu") -> Build:
    """A run's objects in this process, with the state of its newest whole checkpoint.

    Args:
        run: the run directory.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        RunDirError: not a run, or one without a checkpoint.
        CheckpointError: no checkpoint is whole.
    """
    if not (run / RECIPE).is_file():
        raise RunDirError(f"{run} is not a run: it holds no {RECIPE}")
    recipe: Recipe = load_recipe(run / RECIPE)
    # Whatever mesh it was trained on, here is one process.
    recipe = recipe.model_copy(update={"mesh": recipe.mesh.model_copy(update={"rows": None})})
    built = build(recipe, join(LaunchFacts(), timeout_s=0, device=device))
    if RunState(built, run / CHECKPOINTS).restore() is None:
        raise RunDirError(f"{run} holds no checkpoint yet")
    return built


def evaluate_run(run: Path, data: Sequence[str], split: Split, device: str = "cpu") -> Iterator[tuple[str, float]]:
    """Accuracies in percent of a run's teachers, ensembles and student.

    Args:
        run: the run directory.
        data: `key=value` over the run's evaluation set, or a whole set where the run has none.
        split: `train`, `val` or `test`.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        RecipeError: no image set is known, or a key is wrong.
    """
    yield from accuracies(open_finished(run, device), run, data, split)


def accuracies(built: Build, run: Path, data: Sequence[str], split: Split) -> Iterator[tuple[str, float]]:
    """`evaluate_run` of a run that is open."""
    dataset, spec = dataset_of(built, data), built.recipe.evaluation
    if dataset is None:
        raise RecipeError(f"{run} has no evaluation set; give --data kind=... size=... channels=... [path=...]")
    batch, parties = (spec.batch, spec.split) if spec is not None else (256, None)
    yield from evaluate.evaluate(built, dataset, split, batch=batch, parties=parties).items()


def dataset_of(built: Build, data: Sequence[str]) -> DatasetSpec | None:
    """The run's evaluation set with `key=value` over it, or a whole set where it has none; None without either.

    Raises:
        RecipeError: a key is wrong.
    """
    spec = built.recipe.evaluation
    tree = spec.dataset.model_dump() if spec is not None else {}
    for override in data:
        apply_override(tree, override)
    return parse(DatasetSpec, tree, where="--data") if tree else None


def export_run(run: Path, out: Path | None, *, onnx: bool) -> list[Path]:
    """Write the student as safetensors with its card and, if asked, as ONNX; the files written."""
    built = open_finished(run)
    target = out or run / "export" / "student"
    files = export.export_student(built, target)
    if onnx:
        files.append(export.export_onnx(files[0], target.with_suffix(".onnx"), built.recipe.image))
    return files
