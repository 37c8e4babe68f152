"""How good a student is when there are no labels: agreement with the ensemble that it learned from, by class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.data.datasets import to_image_space
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.evaluate import Panel, column_images, kept_set
from dfkd_dist.engine.teachers import teacher_weights
from dfkd_dist.losses.distillation import kl, tempered_mean
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.generative import GenerativeSource
from dfkd_dist.sources.inversion import InversionSource

SYNTHETIC, POOL, SUPPLIED = "synthetic", "pool", "supplied"
"""Held-out images of the generators; the newest of an inversion's pool, which the student has learned from; images that
the recipe's `evaluation` names, without their labels."""


@dataclass(frozen=True)
class Agreement:
    """Student against ensemble; None where there is no image.

    Args:
        images: how many. In segmentation a pixel counts for its part of an image, so that the numbers of all classes
            add up to that of the images.
        agreement: percent of images (or of pixels) on which both choose the same class.
        kl: mean KL(ensemble || student) at temperature 1, in nats.
    """

    images: float
    agreement: float | None
    kl: float | None


@dataclass(frozen=True)
class Quality:
    """Agreement on one set of images (or their pixels), over all and for each class that the ensemble predicts."""

    overall: Agreement
    by_class: list[Agreement]
    of_pixels: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(build: Build, *, per_generator: int = 256, batch: int = 256) -> dict[str, Quality]:
    """Quality on each set of images that the run can have; all ranks call it alike and get the same.

    Args:
        build: the run; without teachers there is no ensemble, and the result is empty.
        per_generator: held-out images of each generator, from latents that training never draws; or so many of the
            pool for each teacher.
        batch: images at a time in each column of the mesh.

    Raises:
        DatasetError: the recipe's evaluation images cannot be read.
    """
    if not build.cards:
        return {}
    found: dict[str, Quality] = {}
    if isinstance(build.source, GenerativeSource):
        found[SYNTHETIC] = _compare(build, _synthetic(build, build.source, per_generator, batch))
    if isinstance(build.source, InversionSource) and len(build.source.pool):
        found[POOL] = _compare(build, _pooled(build, build.source, per_generator * len(build.cards), batch))
    if build.recipe.evaluation is not None:
        found[SUPPLIED] = _compare(build, _supplied(build, batch))
    return found


def _compare(build: Build, columns: Iterator[Tensor]) -> Quality:
    """Agreement on images that arrive column by column."""
    panel, weights, classes = Panel(build), teacher_weights(build.recipe), build.recipe.num_classes
    per_image = 1
    # Images (or pixels), agreements and KL, by the class that the ensemble predicts; in double, exact enough for sums.
    sums_3C = torch.zeros(3, classes, dtype=torch.float64, device=build.device)
    for column_NCHW in columns:
        teachers, student_NC = panel.ask(column_NCHW)
        ensemble_NC = tempered_mean(teachers, weights, 1.0)
        choice_N = ensemble_NC.argmax(dim=1)
        same_N = choice_N == student_NC.argmax(dim=1)
        per_image = math.prod(student_NC.shape[2:])  # pixels are rows like images
        divergence_N = kl(_rows(ensemble_NC), _rows(student_NC), 1.0)
        values_3N = torch.stack([torch.ones_like(choice_N).flatten(), same_N.flatten(), divergence_N])
        sums_3C.index_add_(1, choice_N.flatten(), values_3N.double())
    build.mesh.world.sum_(sums_3C)
    by_class = [_agreement(column.tolist(), per_image) for column in sums_3C.cpu().unbind(dim=1)]
    return Quality(_agreement(sums_3C.sum(dim=1).tolist(), per_image), by_class, build.side.network.dense)


def _rows(scores_NC: Tensor) -> Tensor:
    """`[N, C]` as it is, `[N, C, H, W]` as `[N * H * W, C]`."""
    return scores_NC if scores_NC.dim() == 2 else scores_NC.movedim(1, -1).flatten(0, -2)


def _agreement(sums: list[float], per_image: int) -> Agreement:
    rows, same, divergence = (int(sums[0]), *sums[1:])
    if not rows:
        return Agreement(0, None, None)
    images = rows // per_image if rows % per_image == 0 else rows / per_image
    return Agreement(images, 100.0 * same / rows, divergence / rows)


def _synthetic(build: Build, source: GenerativeSource, count: int, batch: int) -> Iterator[Tensor]:
    """`count` images of every generator, dealt over the columns; a generator's images do not depend on the ranks."""
    mesh = build.mesh
    low, high = bounds(count, mesh.topology.columns, mesh.topology.column_of(mesh.rank))
    own = [source.sample(kit, count)[low:high] for kit in source.kits]
    column_NCHW = build.trainer.exchange.gather(own, count).column_NCHW
    assert column_NCHW is not None
    yield from column_NCHW.split(batch)


def _pooled(build: Build, source: InversionSource, count: int, batch: int) -> Iterator[Tensor]:
    """The newest `count` images of the pool, dealt over the columns."""
    mesh, pool = build.mesh, source.pool
    newest = torch.arange(max(0, len(pool) - count), len(pool), device="cpu")
    low, high = bounds(len(newest), mesh.topology.columns, mesh.topology.column_of(mesh.rank))
    for start in range(low, high, batch):
        made = pool.read(newest[start : min(start + batch, high)])
        yield to_image_space(made.images_NCHW, source.dtype)


def _supplied(build: Build, batch: int) -> Iterator[Tensor]:
    """The recipe's evaluation images, a column's slice of each global batch."""
    spec = build.recipe.evaluation
    assert spec is not None
    images = kept_set(spec.dataset, "test")
    dtype, world_batch = next(build.side.network.parameters()).dtype, batch * build.mesh.topology.columns
    for start in range(0, len(images), world_batch):
        pixels, _ = column_images(images, start, world_batch, build)
        yield to_image_space(pixels.to(build.device), dtype)
