"""The part of `build` that makes streams of real images, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dfkd_dist.config import AugmentSpec, ReaderSpec, Recipe, SelectionSpec, StreamSpec
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.data.stream.stream import Stream
from dfkd_dist.engine.checks import check_labels
from dfkd_dist.models.cards import Card
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.selection import Selector, make_selector
from dfkd_dist.sources.stream import StreamReader, StreamSource
from dfkd_dist.sources.views import make_views


@dataclass(frozen=True)
class Place:
    """A recipe, and where on the mesh and in which format its objects live."""

    recipe: Recipe
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    randomness: Randomness
    cards: list[Card]
    weights: Sequence[float]
    """w_k of the teachers."""


def stream_source(place: Place, spec: StreamSpec, manifest: Manifest, exchange: Exchange) -> StreamSource:
    """Images of a shard set for the student."""
    recipe = place.recipe
    check_labels(recipe, manifest)
    quarantine = Quarantine(recipe.run_dir(), place.mesh.rank)
    world = place.mesh.world
    reader = stream_reader(place, spec.reader, manifest, recipe.batch, world, recipe.augment, quarantine)
    selector = selection(place, spec.selection, spec.reader, manifest, exchange, quarantine)
    steps = None if recipe.rounds.student_steps == "epoch" else recipe.rounds.student_steps
    maker = make_views(recipe.objective, place.mesh.sync_world, place.randomness, recipe.batch)
    return StreamSource(reader, selector, exchange, steps, maker)


def stream_reader(
    place: Place,
    spec: ReaderSpec,
    manifest: Manifest,
    batch: int,
    group: Group,
    augment: AugmentSpec | None,
    quarantine: Quarantine,
) -> StreamReader:
    """Global batches that the ranks of `group` share; `augment` None reads images as they are."""
    image = place.recipe.image
    stream = Stream(
        manifest,
        spec,
        batch=batch,
        size=image.size,
        channels=image.channels,
        seed=place.recipe.seed,
        rank=group.rank,
        world_size=group.size,
        quarantine=quarantine,
    )
    return StreamReader(stream, batch, group, place.randomness, augment, place.dtype, place.device)


def selection(
    place: Place,
    spec: SelectionSpec | None,
    reader: ReaderSpec,
    manifest: Manifest,
    exchange: Exchange,
    quarantine: Quarantine,
) -> Selector | None:
    """Which samples are used, or None for all."""
    if spec is None:
        return None
    recipe = place.recipe
    return make_selector(
        spec,
        reader,
        manifest,
        mesh=place.mesh,
        exchange=exchange,
        teacher_weights=place.weights,
        cards=place.cards,
        image=recipe.image,
        rounds=recipe.rounds,
        seed=recipe.seed,
        folder=recipe.run_dir(),
        dtype=place.dtype,
        device=place.device,
        quarantine=quarantine,
    )
