"""A pool made once, without a student: all rounds of a synthesis, as a set of shards with soft targets beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dfkd_dist.config import InversionSpec, ObjectiveSpec, Recipe, RecipeError
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pool import Pool
from dfkd_dist.data.pool_shards import TARGETS
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.engine.look.balance import Balance
from dfkd_dist.engine.look.sheet import MOST_ROWS, PER_CLASS, Row, save_sheet
from dfkd_dist.engine.passes_inversion import student_is_read
from dfkd_dist.engine.report import SUMMARY, write_summary
from dfkd_dist.engine.run import Session, run
from dfkd_dist.engine.rundir import CHECKPOINTS, check_run
from dfkd_dist.engine.teachers import teacher_weights
from dfkd_dist.losses.distillation import tempered_mean
from dfkd_dist.parallel.launch import LaunchFacts
from dfkd_dist.sources.inversion import InversionSource

RUN = "run"
"""Folder beside the shards: recipe, metrics, summary, contact sheet; checkpoints until the pool is finished."""
SHEET = "sheet.png"


def synthesize(
    recipe: Recipe,
    out: Path,
    facts: LaunchFacts | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> tuple[int, dict[str, Any] | None]:
    """Make all rounds' images into the folder `out`; every rank of the launch calls it.

    A pool that is finished is left alone with `resume`.

    Returns:
        The process's exit code as `engine.run.run`, and a summary where the pool is finished.

    Raises:
        RecipeError: no inversion, or one that plays against a student that nobody trains here.
        ValueError, CheckpointError, SystemExit: as `engine.run.run`.
    """
    recipe = recipe_of_pool(recipe, out)
    if resume and is_finished(out):
        check_run(recipe, resume=True, overwrite=False)
        _forget_checkpoints(recipe.run_dir())
        return 0, json.loads((recipe.run_dir() / SUMMARY).read_text(encoding="utf-8"))
    return run(recipe, facts, resume=resume, overwrite=overwrite, device=device, session=Synthesis)


def recipe_of_pool(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with `out` as its pool, every teacher's answers kept, and nothing for the student.

    Raises:
        RecipeError: names the key, what was found and what is allowed.
    """
    source = recipe.source
    if not isinstance(source, InversionSpec):
        raise RecipeError(f"source.kind is {source.kind}; allowed for a pool: inversion")
    weights = source.synthesis.loss.weights()
    untrained = recipe.student.weights is None and not recipe.student.pretrained
    if student_is_read(weights) and source.assistant is None and untrained:
        against = ", ".join(f"source.synthesis.loss.{term}" for term in ("js", "adv") if weights.get(term, 0.0) > 0)
        raise RecipeError(
            f"{against}: the images play against the student, and no student learns while a pool is made; set it to 0, "
            "or give student.weights"
        )
    pool = source.pool.model_copy(update={"folder": str(out), "targets": "stored"})
    literal = str(out / RUN).replace("{", "{{").replace("}", "}}")
    return recipe.model_copy(
        update={
            "out": literal,
            "source": source.model_copy(update={"pool": pool}),
            "objective": ObjectiveSpec(),
            "compensation": None,
            "evaluation": None,
        }
    )


def is_finished(out: Path) -> bool:
    """Whether the folder holds a whole pool: its targets name its manifest."""
    if not (out / TARGETS).is_file():
        return False
    try:
        with safe_open(out / TARGETS, "pt") as facts:
            return bool(facts.metadata().get("manifest") == read_manifest(out).digest)
    except DatasetError:
        return False


class Synthesis(Session):
    """A run in which every round is one without a student."""

    def go(self) -> dict[str, Any]:
        """Resume, make all images, finish the pool; the summary."""
        self.build.trainer.warmup = self.build.trainer.rounds
        return super().go()

    def _finish(self) -> dict[str, Any]:
        source = self.build.source
        assert isinstance(source, InversionSource)
        summary = self._on_first(lambda: self._finished(source.pool))
        self.tracker.close()
        return summary

    def _finished(self, pool: Pool) -> dict[str, Any]:
        """The last shard, then what is said about the pool, and last what makes it a whole one; on rank 0."""
        assert pool.shards is not None
        classes, manifest = pool.shards.classes, pool.finish()
        answers = list(pool.fact("logits_NKC").unbind(dim=1))
        said_N = tempered_mean(answers, teacher_weights(self.recipe), 1.0).argmax(dim=1)
        counts = torch.bincount(said_N, minlength=len(classes)).tolist()
        summary = {
            "name": self.recipe.name,
            "method": self.recipe.method,
            "seed": self.recipe.seed,
            "images": len(pool),
            "digest": manifest.digest,
            "agreement": 100.0 * float((said_N == pool.fact("labels_N")).double().mean()),
            "balance": Balance(self.recipe.name, "ensemble", tuple(classes), tuple(counts)).as_dict(),
            "wall_seconds": self.seconds(),
        }
        save_sheet(_rows(pool, classes), self.path / SHEET)
        write_summary(self.path, summary)
        pool.seal()
        _forget_checkpoints(self.path)
        return summary


def _forget_checkpoints(run: Path) -> None:
    """They name files that a whole pool has no more."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def _rows(pool: Pool, classes: list[str]) -> list[Row]:
    """The first images of each class, by the labels that they were to have."""
    labels_N = pool.fact("labels_N")
    rows = []
    for label, name in enumerate(classes[:MOST_ROWS]):
        ids_n = (labels_N == label).nonzero().flatten()
        images = pool.read(ids_n[:PER_CLASS]).images_NCHW.cpu()
        rows.append(Row(name, images, found=len(ids_n)))
    return rows
