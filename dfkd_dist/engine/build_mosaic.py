"""The part of `build` that makes MosaicKD's discriminators, its streams and its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dfkd_dist.config import DiscriminatorSpec, MosaicSpec, Recipe, RecipeError
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.engine.build_streams import Place, selection, stream_reader
from dfkd_dist.engine.optim import make_player
from dfkd_dist.engine.seeding import seeded
from dfkd_dist.models.discriminator import PatchDiscriminator
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.generative import Kit
from dfkd_dist.sources.mosaic import MosaicSource
from dfkd_dist.sources.selection import Selector
from dfkd_dist.sources.stream import StreamReader


@dataclass(frozen=True)
class RealImages:
    """What reads images from another domain, and chooses among them.

    Args:
        patches: B of them a batch, as they are, over the row; None without discriminators.
        beside: `ood_batch` of them a batch, augmented, over the world; None where the student sees none.
        selector: which of them are used; None for all.
    """

    patches: StreamReader | None = None
    beside: StreamReader | None = None
    selector: Selector | None = None


def real_images(place: Place, spec: MosaicSpec, manifest: Manifest | None, exchange: Exchange) -> RealImages:
    """The streams that the recipe asks for.

    Raises:
        DatasetError: fewer images than one batch, or shards that cannot be read.
    """
    if spec.reader is None:
        return RealImages()
    assert manifest is not None
    mesh, reader = place.mesh, spec.reader
    quarantine = Quarantine(place.recipe.run_dir(), mesh.rank)
    patches = beside = None
    if spec.discriminator is not None:
        patches = stream_reader(place, reader, manifest, place.recipe.batch, mesh.row, None, quarantine)
    if spec.ood_batch:
        beside = stream_reader(place, reader, manifest, spec.ood_batch, mesh.world, spec.ood_augment, quarantine)
    return RealImages(patches, beside, selection(place, spec.selection, reader, manifest, exchange, quarantine))


def discriminator(
    recipe: Recipe, mesh: Mesh, spec: DiscriminatorSpec, teacher: str, placed: Callable[[nn.Module], Any]
) -> Player:
    """The player over a teacher's discriminator; `placed` moves a module to its device and number format.

    Raises:
        RecipeError: the images are smaller than a patch, or the stride is larger than the score map.
    """
    name, image = f"discriminator/{teacher}", recipe.image
    try:
        with seeded(recipe.seed, "discriminator", teacher):
            module = PatchDiscriminator(image.channels, spec.field, spec.width, spec.stride, image.size)
    except ValueError as error:
        raise RecipeError(f"source.discriminator: {error}") from error
    synchronise(module, mesh.sync)
    return make_player(name, placed(module), spec.optimizer, spec.schedule, recipe.rounds.total, mesh.row)


def mosaic_source(
    place: Place,
    spec: MosaicSpec,
    kits: Sequence[Kit],
    exchange: Exchange,
    real: RealImages,
    placed: Callable[[nn.Module], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> MosaicSource:
    """Generators (in `kits`), a discriminator for each, and the student's images.

    Raises:
        RecipeError: the discriminator does not fit the images.
    """
    recipe, mesh, judge = place.recipe, place.mesh, spec.discriminator
    if judge is not None:
        players = [discriminator(recipe, mesh, judge, kit.teacher.name, placed) for kit in kits]
        kits = [replace(kit, discriminator=player) for kit, player in zip(kits, players, strict=True)]
    return MosaicSource(
        spec,
        recipe.rounds,
        recipe.batch,
        kits,
        mesh,
        exchange,
        place.randomness,
        recipe.augment,
        place.dtype,
        place.device,
        autocast,
        patches=real.patches,
        beside=real.beside,
        selector=real.selector,
    )
