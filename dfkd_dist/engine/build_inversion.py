"""The part of `build` that makes an inversion source: a synthesis for each teacher, and the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_dist.config import CMISpec, DeepInversionSpec, FastSpec, InversionSpec, Recipe, RecipeError
from dfkd_dist.data.pool import Pool
from dfkd_dist.data.pool_shards import PoolShards
from dfkd_dist.engine.build_latent import make_cmi, make_fast
from dfkd_dist.engine.build_streams import Place
from dfkd_dist.engine.checks import agreed
from dfkd_dist.engine.teachers import reference_classes
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.objectives.registry import needed
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.sources.assistants import PoolAssistants, Pupil
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis.base import Bench, Synthesiser
from dfkd_dist.sources.synthesis.cmi import CMI
from dfkd_dist.sources.synthesis.deepinversion import DeepInversion
from dfkd_dist.sources.synthesis.fast import Fast

Placed = Callable[[nn.Module], Any]
"""Moves a module to its device and number format."""
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Workshop:
    """What a synthesis may be made from, besides its bench.

    Args:
        place: the recipe and where its objects live (for `engine.seeding`, `engine.optim.make_player`).
        placed: moves a module to its device and number format.
        student_card: the student's.
        assistants: the network that plays against a teacher's images in the student's place, by the teacher's name.
    """

    place: Place
    placed: Placed
    student_card: Card
    assistants: Mapping[str, ImageNetwork] = field(default_factory=dict)

    def student(self) -> ImageNetwork:
        """A network like the student, without weights (on device `meta`)."""
        with torch.device("meta"):
            card = self.student_card
            return ImageNetwork(card.build(), card.preprocess(self.place.recipe.image.size), "student")


def inversion_source(
    place: Place,
    spec: InversionSpec,
    teachers: Sequence[Teacher],
    exchange: Exchange,
    student_card: Card,
    placed: Placed,
    autocast: Autocast,
    pool: Pool,
    pupils: Sequence[Pupil] = (),
) -> InversionSource:
    """A synthesis for each of this rank's teachers (sealed, batch norm as it came), and the pool.

    Args:
        place: recipe and mesh.
        spec: its source.
        teachers: this rank's.
        exchange: of the student's step.
        student_card: the student's.
        placed: moves a module to its device and number format.
        autocast: the number format of trained networks.
        pool: where images are kept, the same on all ranks.
        pupils: this rank's teachers' assistants, where the recipe has any.

    Raises:
        RecipeError: what is wrong with the recipe, or does not fit its teachers.
    """
    recipe = place.recipe
    check_targets(recipe, spec)
    networks = {pupil.answering.name: pupil.side.network for pupil in pupils}
    make, workshop = SYNTHESISERS[spec.synthesis.kind], Workshop(place, placed, student_card, networks)
    benches = [bench(place, spec, teacher, autocast) for teacher in teachers]
    synthesisers = agreed(place.mesh.world, lambda: [make(spec.synthesis, each, workshop) for each in benches])
    return InversionSource(
        spec,
        recipe.batch,
        synthesisers,
        pool,
        place.mesh,
        exchange,
        place.randomness,
        recipe.augment,
        place.dtype,
        place.device,
        _assistants(place, spec, pupils, pool, autocast),
    )


def _assistants(
    place: Place, spec: InversionSpec, pupils: Sequence[Pupil], pool: Pool, autocast: Autocast
) -> PoolAssistants | None:
    if spec.assistant is None:
        return None
    recipe = place.recipe
    return PoolAssistants(
        pupils,
        spec.assistant.steps,
        pool,
        spec.per_round(recipe.batch),
        len(recipe.teachers),
        recipe.batch,
        place.mesh,
        place.randomness,
        recipe.augment,
        place.dtype,
        place.device,
        autocast,
    )


def bench(place: Place, spec: InversionSpec, teacher: Teacher, autocast: Autocast) -> Bench:
    """What a teacher's synthesis works with."""
    recipe = place.recipe
    return Bench(
        teacher,
        place.mesh,
        place.randomness,
        spec.per_round(recipe.batch),
        recipe.image.channels,
        recipe.image.size,
        recipe.num_classes,
        recipe.rounds.warmup,
        place.dtype,
        place.device,
        autocast,
    )


def check_targets(recipe: Recipe, spec: InversionSpec) -> None:
    """Refuse kept answers where the student wants more of the teachers than logits.

    Raises:
        RecipeError: names the key and the signals.
    """
    more = sorted(needed(recipe.objective) - {LOGITS})
    if spec.pool.targets == "stored" and more:
        raise RecipeError(
            f"source.pool.targets is stored, which keeps logits, but the objective wants {', '.join(more)} of the "
            "teachers; allowed: asked"
        )


def _deep_inversion(spec: DeepInversionSpec, bench: Bench, workshop: Workshop) -> DeepInversion:
    image = workshop.place.recipe.image
    seeing = [bench.teacher] + ([workshop.student()] if spec.loss.js > 0 else [])
    for n, stage in enumerate(spec.stages):
        if stage.scale > 1:
            for network in seeing:
                _try_side(f"source.synthesis.stages.{n}.scale", network, image.channels, image.size // stage.scale)
    return DeepInversion(spec, bench)


def _try_side(key: str, network: ImageNetwork, channels: int, side: int) -> None:
    """Refuse a resolution that a network does not take: RecipeError names the key, the network and what it says."""
    try:
        with torch.no_grad():
            network.eval()(network.preprocess.mean.new_zeros(1, channels, side, side), scaled=True)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise RecipeError(f"{key}: network {network.name} does not take images of {side} px: {said}") from error


def _cmi(spec: CMISpec, bench: Bench, workshop: Workshop) -> CMI:
    return make_cmi(spec, bench, workshop.place, workshop.placed, workshop.assistants.get(bench.name))


def _fast(spec: FastSpec, bench: Bench, workshop: Workshop) -> Fast:
    return make_fast(spec, bench, workshop.place, workshop.placed, workshop.assistants.get(bench.name))


SYNTHESISERS: dict[str, Callable[[Any, Bench, Workshop], Synthesiser]] = {
    "deepinversion": _deep_inversion,
    "cmi": _cmi,
    "fast": _fast,
}
"""`source.synthesis.kind` to what makes it from its section of the recipe."""


def pool_folder(recipe: Recipe, spec: InversionSpec) -> Path:
    """Where the pool's shards go."""
    return Path(spec.pool.folder) if spec.pool.folder is not None else recipe.run_dir() / "pool"


def pool_capacity(recipe: Recipe, spec: InversionSpec) -> int:
    """Images that the pool keeps in memory: as many as are allowed, as are ever made, and at least what it needs."""
    made = spec.per_round(recipe.batch) * len(recipe.teachers)
    allowed = int(spec.pool.memory_gb * 1e9) // _image_bytes(recipe)
    return max(min(allowed, made * recipe.rounds.total), min(made * recipe.rounds.total, made + spec.pool.shard))


def make_pool(place: Place, spec: InversionSpec) -> Pool:
    """The run's pool, on every rank."""
    recipe, image = place.recipe, place.recipe.image
    classes = reference_classes(place.cards) or [str(c) for c in range(recipe.num_classes)]
    owner = {"name": recipe.name, "seed": recipe.seed}
    shards = PoolShards(pool_folder(recipe, spec), spec.pool.shard, classes, owner)
    return Pool(image.channels, image.size, pool_capacity(recipe, spec), place.device, shards)


# ------------------------------------------------------------------------------------------------- for a plan

NEVER = 2**31
"""Images of a shard that is never full."""
MOST_ROUNDS = 4
"""A plan and its probe run no more rounds."""


def shortened(recipe: Recipe, spec: InversionSpec) -> InversionSpec:
    """The recipe's source with one step for each phase, and a pool of the size that a whole run's has."""
    made = spec.per_round(recipe.batch) * len(recipe.teachers)
    images = max(pool_capacity(recipe, spec), MOST_ROUNDS * made)
    memory_gb = (images + 0.5) * _image_bytes(recipe) / 1e9
    pool = spec.pool.model_copy(update={"memory_gb": memory_gb, "shard": NEVER})
    helper = None if spec.assistant is None else spec.assistant.model_copy(update={"steps": 1, "pretrained": False})
    return spec.model_copy(update={"synthesis": spec.synthesis.shortened(), "pool": pool, "assistant": helper})


def dry_pool(recipe: Recipe, spec: InversionSpec, device: torch.device) -> Pool:
    """A pool without shards, of exactly the size that a shortened recipe gives."""
    capacity = int(spec.pool.memory_gb * 1e9) // _image_bytes(recipe)
    return Pool(recipe.image.channels, recipe.image.size, capacity, device)


def _image_bytes(recipe: Recipe) -> int:
    return recipe.image.channels * recipe.image.size**2
