"""`dfkd teachers train`: private parties, each training a teacher on its own share of a labelled set."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.config import (
    EvaluationSpec,
    ImageSpec,
    LabelledSpec,
    LogSpec,
    ObjectiveSpec,
    Recipe,
    RoundsSpec,
    StudentSpec,
    TeachersRecipe,
    dump,
)
from dfkd_dist.data.datasets import ImageSet, load_image_set, to_image_space
from dfkd_dist.data.splits import frequent_classes
from dfkd_dist.engine.build import party_shares
from dfkd_dist.engine.export import STUDENT
from dfkd_dist.engine.run import run
from dfkd_dist.engine.rundir import RunDirError
from dfkd_dist.models.cards import Card, read_card, save_network
from dfkd_dist.models.weights import load_state

log = logging.getLogger(__name__)

GOLD = "gold"
"""The name of the network trained on all the data."""
STATISTICS_SAMPLE = 10_000
"""Images from which a party measures its own mean and standard deviation."""


def train_teachers(recipe: TeachersRecipe, *, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Train every party's teacher, and the gold standard if asked; each is a run of the one training loop.

    With `resume`, finished teachers are kept and an unfinished one goes on from its checkpoint.

    Returns:
        For each network its name, file, accuracy on the test split and on its party's frequent classes (percent).

    Raises:
        RunDirError: the directory holds teachers and neither flag was given.
        DatasetError: the data does not fit the recipe.
        InterruptedError: a signal stopped the training; resume goes on.
    """
    folder = recipe.out_dir()
    if folder.exists() and any(folder.iterdir()) and not (resume or overwrite):
        raise RunDirError(f"{folder} exists; give --resume to go on, --overwrite to start again, or out=OTHER")
    images = load_image_set(recipe.dataset, "train")
    shares = party_shares(images, recipe.split)
    archs = recipe.archs * (recipe.split.parties if len(recipe.archs) == 1 else 1)
    jobs = [(f"t{k}", arch, shares[k], k) for k, arch in enumerate(archs)]
    if recipe.gold is not None:
        jobs.append((GOLD, recipe.gold, torch.arange(len(images)), None))
    results = [_train_one(recipe, images, job, folder, resume, overwrite) for job in jobs]
    (folder / "teachers.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "teachers.yaml").write_text(dump(recipe))
    return results


def _train_one(
    recipe: TeachersRecipe,
    images: ImageSet,
    job: tuple[str, str, torch.Tensor, int | None],
    folder: Path,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    name, arch, share, party = job
    target = folder / f"{name}.safetensors"
    if resume and target.with_suffix(".json").is_file():
        log.info("%s is finished already", target)
        return dict(json.loads(target.with_suffix(".json").read_text())["about"])
    one = _recipe_of(recipe, name, arch, images, share, party, folder)
    code, summary = run(one, resume=resume, overwrite=overwrite)
    if summary is None:
        raise InterruptedError(f"training of {name} stopped with exit code {code}; go on with --resume")
    exported = one.run_dir() / STUDENT
    frequent = frequent_classes(len(images.classes), recipe.split.parties)[party] if party is not None else None
    card = replace(Card(**read_card(exported)), frequent=frequent)
    about = {
        "name": name,
        "file": str(target),
        "images": len(share),
        "accuracy": summary["student"]["accuracy"],
        "frequent_accuracy": summary["student"]["frequent"][party] if party is not None else None,
    }
    save_network(target, load_state(exported), card, about)
    return about


def _recipe_of(
    recipe: TeachersRecipe,
    name: str,
    arch: str,
    images: ImageSet,
    share: torch.Tensor,
    party: int | None,
    folder: Path,
) -> Recipe:
    """One party's training as an ordinary recipe: a labelled source and cross-entropy."""
    rounds = recipe.epochs * max(len(share) // recipe.batch, 1)
    mean, std = (recipe.mean, recipe.std) if recipe.mean and recipe.std else _statistics(images, share)
    return Recipe(
        name=f"{recipe.name}-{name}",
        method="supervised",
        seed=recipe.seed,
        out=str(folder / "runs" / name),
        image=ImageSpec(size=recipe.dataset.size, channels=recipe.dataset.channels),
        num_classes=len(images.classes),
        batch=recipe.batch,
        rounds=RoundsSpec(main=rounds),
        student=StudentSpec(arch=arch, pretrained=recipe.pretrained, mean=mean, std=std, classes=list(images.classes)),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        source=LabelledSpec(kind="labelled", dataset=recipe.dataset, split=recipe.split, party=party),
        objective=ObjectiveSpec(kl=0.0, ce=1.0),
        augment=recipe.augment,
        precision=recipe.precision,
        evaluation=EvaluationSpec(dataset=recipe.dataset, split=recipe.split),
        log=LogSpec(every=max(rounds // 20, 1), grids=False),
    )


def _statistics(images: ImageSet, share: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of a party's own images, in [0, 1] units."""
    pixels = to_image_space(images.images(share[:STATISTICS_SAMPLE]))
    mean = pixels.mean(dim=(0, 2, 3))
    std = pixels.std(dim=(0, 2, 3)).clamp(min=1e-3)
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]
