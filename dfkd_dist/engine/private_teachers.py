"""`dfkd teachers train`: private parties, each training a teacher on its own share of a labelled set."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.config import (
    DatasetSpec,
    EvaluationSpec,
    ImageSpec,
    LabelledSpec,
    LogSpec,
    ObjectiveSpec,
    Recipe,
    RecipeError,
    RoundsSpec,
    StudentSpec,
    TeachersRecipe,
)
from dfkd_dist.data.datasets import DatasetError, ImageSet, Split, to_image_space
from dfkd_dist.data.splits import frequent_classes
from dfkd_dist.engine.build import party_shares
from dfkd_dist.engine.evaluate import kept_set
from dfkd_dist.engine.export import STUDENT
from dfkd_dist.engine.run import run
from dfkd_dist.engine.rundir import check_folder, create_folder
from dfkd_dist.models.cards import Card, read_about, read_card, save_network
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network, has_library_weights
from dfkd_dist.models.weights import load_state
from dfkd_dist.parallel.launch import LaunchError, launch_facts

log = logging.getLogger(__name__)

Job = tuple[str, str, torch.Tensor, int | None]
"""Name, architecture, positions of its images, party (None: all the data)."""

RECIPE = "teachers.yaml"
"""The resolved recipe, in the directory of the teachers."""
GOLD = "gold"
"""The name of the network trained on all the data."""
STATISTICS_SAMPLE = 10_000
"""Images from which a party measures its own mean and standard deviation."""


class Unfinished(RuntimeError):
    """A training ended early; `code` is what the process should end with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def train_teachers(recipe: TeachersRecipe, *, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Train every party's teacher, and the gold standard if asked; each is a run of the one training loop.

    With `resume`, finished teachers are kept and an unfinished one goes on from its checkpoint.

    Returns:
        For each network its name, file, accuracy on the test split and on its party's frequent classes (percent); where
        pixels have the labels, also the mIoU.

    Raises:
        RunDirError: the directory holds teachers and neither flag was given, or those of another recipe.
        DatasetError, RecipeError: the data or a network does not fit the recipe; nothing was written.
        LaunchError: it was started on several ranks.
        Unfinished: a signal stopped the training (resume goes on), or its numbers became infinite.
    """
    ranks = launch_facts().world_size
    if ranks > 1:
        raise LaunchError(
            f"teachers are trained by one process, but {ranks} were started; start `dfkd teachers train` once"
        )
    folder = check_folder(recipe.out_dir(), RECIPE, recipe, resume=resume, overwrite=overwrite)
    images = _read(recipe.dataset, "train")
    _read(recipe.dataset, "test")
    jobs = _jobs(recipe, images)
    # Parties have frequent classes where images have classes at all.
    blocks = [] if images.of_pixels else frequent_classes(len(images.classes), recipe.split.parties)
    create_folder(folder, RECIPE, recipe, overwrite=overwrite)
    results = [_train_one(recipe, images, job, folder, resume, blocks) for job in jobs]
    (folder / "teachers.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _read(spec: DatasetSpec, split: Split) -> ImageSet:
    try:
        return kept_set(spec, split)
    except DatasetError as error:
        raise DatasetError(f"dataset: {error}") from error


def _jobs(recipe: TeachersRecipe, images: ImageSet) -> list[Job]:
    """What is to be trained; networks that cannot be are refused here, before the first one is trained."""
    shares = party_shares(images, recipe.split)
    archs = recipe.archs * (recipe.split.parties if len(recipe.archs) == 1 else 1)
    jobs: list[Job] = [(f"t{k}", arch, shares[k], k) for k, arch in enumerate(archs)]
    if recipe.gold is not None:
        jobs.append((GOLD, recipe.gold, torch.arange(len(images)), None))
    for name, arch, _, _ in jobs:
        try:
            _try_out(recipe, arch, name, len(images.classes))
        except ValueError as error:
            raise RecipeError(f"{'gold' if name == GOLD else 'archs'}: {error}") from error
    return jobs


def _try_out(recipe: TeachersRecipe, arch: str, name: str, classes: int) -> None:
    """Build the network and show it an image, without memory or numbers."""
    size, channels = recipe.crop or recipe.dataset.size, recipe.dataset.channels
    with torch.device("meta"):
        # Library weights are not fetched for this, but a network that has none says so.
        own = recipe.pretrained and not has_library_weights(arch)
        network = build_network(arch, num_classes=classes, in_channels=channels, pretrained=own)
        ImageNetwork(network, Preprocess(size, channels, [0.5] * channels, [0.25] * channels), name)


def _train_one(
    recipe: TeachersRecipe, images: ImageSet, job: Job, folder: Path, resume: bool, blocks: Sequence[list[int]]
) -> dict[str, Any]:
    name, arch, share, party = job
    target = folder / f"{name}.safetensors"
    if resume and target.is_file() and target.with_suffix(".json").is_file():
        log.info("%s is finished already", target)
        return read_about(target) | {"file": str(target)}
    one = _recipe_of(recipe, name, arch, images, share, party, folder)
    code, summary = run(one, resume=resume)
    if summary is None:
        raise Unfinished(f"training of {name} stopped with exit code {code}; go on with --resume", code)
    exported = one.run_dir() / STUDENT
    frequent = blocks[party] if party is not None and blocks else None
    card = replace(Card(**read_card(exported)), frequent=frequent)
    about = {
        "name": name,
        "file": str(target),
        "images": len(share),
        "accuracy": summary["student"]["accuracy"],
        "frequent_accuracy": summary["student"]["frequent"][party] if frequent is not None else None,
    }
    about |= {"miou": summary["student"]["miou"]} if images.of_pixels else {}
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
        image=ImageSpec(size=recipe.crop or recipe.dataset.size, channels=recipe.dataset.channels),
        num_classes=len(images.classes),
        batch=recipe.batch,
        rounds=RoundsSpec(main=rounds),
        student=StudentSpec(arch=arch, pretrained=recipe.pretrained, mean=mean, std=std, classes=list(images.classes)),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        source=LabelledSpec(
            kind="labelled", dataset=recipe.dataset, split=recipe.split, party=party, crop=recipe.crop
        ),
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
