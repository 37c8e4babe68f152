"""Frechet distance between two collections under a network's features: of all images, and by class."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.networks import FeatureNetwork, Judge

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fid:
    """One Frechet distance.

    ||m_r - m_p||^2 + tr(C_r + C_p - 2 (C_r C_p)^(1/2)), with the means m and the unbiased covariances C of the
    features of the real images and of the pool (Heusel et al. 2017, Eq. 6).

    Args:
        value: the distance; None where a side has fewer than two images.
        real: images of the real side.
        pool: images of the other side.
        width: D, the number of features.
    """

    value: float | None
    real: int
    pool: int
    width: int

    @property
    def full_rank(self) -> bool:
        """Whether both sides have at least D + 1 images; with fewer a covariance is singular."""
        return min(self.real, self.pool) > self.width

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "fid": self.value,
            "real_images": self.real,
            "pool_images": self.pool,
            "features": self.width,
            "full_rank": self.full_rank,
        }


@dataclass(frozen=True)
class FidByClass:
    """Distances between the images of one class on either side.

    Args:
        overall: of all images.
        by_class: one for each of the judge's classes, in its order.
        classes: their names.
        real_by: how the real side's images came to their classes: `labels`, or the judge's name.
        pool_by: likewise of the pool.
    """

    overall: Fid
    by_class: list[Fid]
    classes: tuple[str, ...]
    real_by: str
    pool_by: str

    @property
    def mean(self) -> float | None:
        """Mean over the classes that have a distance."""
        known = [fid.value for fid in self.by_class if fid.value is not None]
        return sum(known) / len(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mean": self.mean,
            "real_classes_by": self.real_by,
            "pool_classes_by": self.pool_by,
            "classes": [
                {"class": name, **fid.as_dict()} for name, fid in zip(self.classes, self.by_class, strict=True)
            ],
        }


def fid(real: Collection, pool: Collection, network: FeatureNetwork, *, batch: int = 256) -> Fid:
    """Frechet distance between two collections; every image once, statistics summed in float64.

    A side with fewer images than features + 1 is measured all the same, and said to be so in the log and in the result.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: features are not finite; DatasetError: images cannot be read.
    """
    return warned(distance(_features(real, network, batch), _features(pool, network, batch)), real, pool)


def fid_by_class(
    real: Collection,
    pool: Collection,
    network: FeatureNetwork,
    judge: Judge,
    *,
    batch: int = 256,
    predicted: bool = False,
) -> FidByClass:
    """`fid` of everything, and of the images of each class by themselves (MosaicKD Fig. 3).

    Features of both collections are kept in memory as float32: `4 x N x D` bytes.

    Args:
        real: the images to compare with.
        pool: those that are judged.
        network: whose features.
        judge: whose classes. Where a collection's own labels have the same class names they are taken instead.
        batch: images at a time.
        predicted: ask the judge about every image, labels or not.

    Raises:
        As `fid`.
    """
    sides = [_judged(side, network, judge, batch, predicted) for side in (real, pool)]
    (real_ND, real_N, real_by), (pool_ND, pool_N, pool_by) = sides
    overall = warned(distance([real_ND], [pool_ND]), real, pool)
    by_class = [distance([real_ND[real_N == c]], [pool_ND[pool_N == c]]) for c in range(len(judge.classes))]
    singular = sum(one.value is not None and not one.full_rank for one in by_class)
    if singular:
        log.warning(
            "FID by class: %d of %d classes have fewer images than features + 1 (%d); such values are biased upwards",
            singular,
            len(by_class),
            overall.width + 1,
        )
    return FidByClass(overall, by_class, judge.classes, real_by, pool_by)


# ------------------------------------------------------------------------------------------- distances


class _Given(nn.Module):
    """What torchmetrics takes for a network: features pass through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features_ND: Tensor) -> Tensor:
        return features_ND


def new_metric(width: int) -> Any:
    """torchmetrics' Frechet distance of features of that width.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics: pip install 'dfkd-dist[metrics]' ({error})") from error
    # Every process looks at every image by itself, so nothing is to be summed over ranks.
    return FrechetInceptionDistance(feature=_Given(width), sync_on_compute=False)


def distance(real: Iterator[Tensor] | Sequence[Tensor], pool: Iterator[Tensor] | Sequence[Tensor]) -> Fid:
    """Between batches of features `[n, D]`; sums and outer products are torchmetrics', in float64."""
    metric, counts, width = None, [0, 0], 0
    for place, side in enumerate((real, pool)):
        for features_ND in side:
            width = features_ND.shape[1]
            metric = new_metric(width).to(features_ND.device) if metric is None else metric
            metric.update(features_ND.double(), real=place == 0)
            counts[place] += len(features_ND)
    if metric is None or min(counts) < 2:
        return Fid(None, counts[0], counts[1], width)
    value = float(metric.cpu().compute())
    # Rounding may leave a distance of nothing slightly below it.
    return Fid(max(value, 0.0), counts[0], counts[1], width)


def warned(found: Fid, real: Collection, pool: Collection) -> Fid:
    """The same distance; the log says so where a covariance was singular."""
    if found.value is not None and not found.full_rank:
        log.warning(
            "FID of %s (%d images) and %s (%d images): with fewer than %d images (features + 1) on a side a covariance "
            "is singular and the value is biased upwards",
            real.name,
            found.real,
            pool.name,
            found.pool,
            found.width + 1,
        )
    return found


def _features(collection: Collection, network: FeatureNetwork, batch: int) -> Iterator[Tensor]:
    return (network.of(seen) for seen in collection.batches(batch))


def _judged(
    collection: Collection, network: FeatureNetwork, judge: Judge, batch: int, predicted: bool
) -> tuple[Tensor, Tensor, str]:
    """Features `[N, D]`, classes `[N]`, and who said so."""
    order = None if predicted else label_order(collection, judge)
    features, classes = [], []
    for seen in collection.batches(batch):
        features.append(network.of(seen).float().cpu())
        classes.append(judge(seen)[0] if order is None or seen.labels_N is None else order[seen.labels_N])
    return torch.cat(features), torch.cat(classes), judge.name if order is None else "labels"


def label_order(collection: Collection, judge: Judge) -> Tensor | None:
    """`[C + 1]` from a collection's labels to the judge's classes (-1 stays -1); None where the names differ."""
    if collection.classes is None or set(collection.classes) != set(judge.classes):
        return None
    place = {name: c for c, name in enumerate(judge.classes)}
    return torch.tensor([place[name] for name in collection.classes] + [-1])
