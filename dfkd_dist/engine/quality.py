"""How good a student is when there are no labels: agreement with the ensemble that it learned from, by class."""

from __future__ import annotations

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

SYNTHETIC, SUPPLIED = "synthetic", "supplied"
"""Held-out images of the generators; images that the recipe's `evaluation` names, without their labels."""


@dataclass(frozen=True)
class Agreement:
    """Student against ensemble; None where there is no image.

    Args:
        images: how many.
        agreement: percent of images on which both choose the same class.
        kl: mean KL(ensemble || student) at temperature 1, in nats.
    """

    images: int
    agreement: float | None
    kl: float | None


@dataclass(frozen=True)
class Quality:
    """Agreement on one set of images, over all of them and for each class that the ensemble predicts."""

    overall: Agreement
    by_class: list[Agreement]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(build: Build, *, per_generator: int = 256, batch: int = 256) -> dict[str, Quality]:
    """Quality on each set of images that the run can have; all ranks call it alike and get the same.

    Args:
        build: the run; without teachers there is no ensemble, and the result is empty.
        per_generator: held-out images of each generator, from latents that training never draws.
        batch: images at a time in each column of the mesh.

    Raises:
        DatasetError: the recipe's evaluation images cannot be read.
    """
    if not build.cards:
        return {}
    found: dict[str, Quality] = {}
    if isinstance(build.source, GenerativeSource):
        found[SYNTHETIC] = _compare(build, _synthetic(build, build.source, per_generator, batch))
    if build.recipe.evaluation is not None:
        found[SUPPLIED] = _compare(build, _supplied(build, batch))
    return found


def _compare(build: Build, columns: Iterator[Tensor]) -> Quality:
    """Agreement on images that arrive column by column."""
    panel, weights, classes = Panel(build), teacher_weights(build.recipe), build.recipe.num_classes
    # Images, agreements and KL, by the class that the ensemble predicts; double, so that ranks' sums are exact enough.
    sums_3C = torch.zeros(3, classes, dtype=torch.float64, device=build.device)
    for column_NCHW in columns:
        teachers, student_NC = panel.ask(column_NCHW)
        ensemble_NC = tempered_mean(teachers, weights, 1.0)
        choice_N = ensemble_NC.argmax(dim=1)
        same_N = choice_N == student_NC.argmax(dim=1)
        values_3N = torch.stack([torch.ones_like(choice_N), same_N, kl(ensemble_NC, student_NC, 1.0)])
        sums_3C.index_add_(1, choice_N, values_3N.double())
    build.mesh.world.sum_(sums_3C)
    by_class = [_agreement(column.tolist()) for column in sums_3C.cpu().unbind(dim=1)]
    return Quality(_agreement(sums_3C.sum(dim=1).tolist()), by_class)


def _agreement(sums: list[float]) -> Agreement:
    images, same, divergence = sums
    if not images:
        return Agreement(0, None, None)
    return Agreement(int(images), 100.0 * same / images, divergence / images)


def _synthetic(build: Build, source: GenerativeSource, count: int, batch: int) -> Iterator[Tensor]:
    """`count` images of every generator, dealt over the columns; a generator's images do not depend on the ranks."""
    mesh = build.mesh
    low, high = bounds(count, mesh.topology.columns, mesh.topology.column_of(mesh.rank))
    own = [source.sample(kit, count)[low:high] for kit in source.kits]
    column_NCHW = build.trainer.exchange.gather(own, count).column_NCHW
    assert column_NCHW is not None
    yield from column_NCHW.split(batch)


def _supplied(build: Build, batch: int) -> Iterator[Tensor]:
    """The recipe's evaluation images, a column's slice of each global batch."""
    spec = build.recipe.evaluation
    assert spec is not None
    images = kept_set(spec.dataset, "test")
    dtype, world_batch = next(build.side.network.parameters()).dtype, batch * build.mesh.topology.columns
    for start in range(0, len(images), world_batch):
        pixels, _ = column_images(images, images.labels_N, start, world_batch, build)
        yield to_image_space(pixels.to(build.device), dtype)
