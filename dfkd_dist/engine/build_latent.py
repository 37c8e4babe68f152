"""The part of `build` that makes CMI's and Fast's players."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dfkd_dist.config import CMISpec, FastSpec, LatentSpec, OptimizerSpec, RecipeError, ScheduleSpec
from dfkd_dist.engine.build_streams import Place
from dfkd_dist.engine.optim import make_player
from dfkd_dist.engine.seeding import seeded
from dfkd_dist.models.dcgan import make_generator
from dfkd_dist.models.heads import ProjectionHead
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.synthesis.cmi import CMI, features_need
from dfkd_dist.sources.synthesis.fast import Fast

Placed = Callable[[nn.Module], Any]


def make_cmi(spec: CMISpec, bench: Bench, place: Place, placed: Placed, assistant: ImageNetwork | None) -> CMI:
    """A teacher's synthesis with its generator and, for the contrast, its head.

    Raises:
        RecipeError: the teacher has no layers like those whose features are to be contrasted.
    """
    generator = _generator(f"generator/{bench.name}", spec, spec.lr, bench, place, placed)
    return CMI(spec, bench, generator, _head(spec, bench, place, placed) if spec.contrasts else None, assistant)


def make_fast(spec: FastSpec, bench: Bench, place: Place, placed: Placed, assistant: ImageNetwork | None) -> Fast:
    """A teacher's synthesis with its meta-generator and the copy that a round adapts."""
    slow = spec.meta.lr or spec.lr * spec.iterations
    theta = _generator(f"meta/{bench.name}", spec, slow, bench, place, placed)
    phi = _generator(f"generator/{bench.name}", spec, spec.lr, bench, place, placed)
    return Fast(spec, bench, theta, phi, assistant)


def _generator(name: str, spec: LatentSpec, lr: float, bench: Bench, place: Place, placed: Placed) -> Player:
    g = spec.generator
    with seeded(place.recipe.seed, "generator", bench.name):
        module = make_generator(g.style, g.latent, g.width, g.blocks, bench.size, bench.channels, g.head)
    synchronise(module, bench.mesh.sync)
    return _player(name, placed(module), lr, spec.betas, bench)


def _head(spec: CMISpec, bench: Bench, place: Place, placed: Placed) -> Player:
    contrast = spec.contrast
    try:
        shapes = bench.teacher.shapes(bench.size, bench.channels, features_need(spec))
    except ValueError as error:
        raise RecipeError(f"source.synthesis.contrast.layers: teacher {bench.name}: {error}") from error
    (width,) = next(iter(shapes.values()))
    with seeded(place.recipe.seed, "head", bench.name):
        module = ProjectionHead(width, contrast.dim)
    return _player(f"head/{bench.name}", placed(module), contrast.lr or spec.lr, [0.9, 0.999], bench)


def _player(name: str, module: nn.Module, lr: float, betas: list[float], bench: Bench) -> Player:
    optimizer = OptimizerSpec(kind="adam", lr=lr, betas=betas)
    # The rate is constant, so it does not matter how many steps there will be.
    return make_player(name, module, optimizer, ScheduleSpec(), 1, bench.mesh.row)
