"""Features drawn in the plane by t-SNE: of several collections (KD3 Fig. 3), or of classes (KDCI Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.networks import FeatureNetwork
from dfkd_dist.engine.look.plots import new_figure, save_figure

POINTS, PERPLEXITY = 1000, 30.0
"""Images of each group (KD3 draws 1,000), and the neighbours that a point looks at."""
NAMED_CLASSES = 20
"""With more classes a legend would hide the points."""


@dataclass(frozen=True)
class Map:
    """Points in the plane.

    Args:
        title: whose features.
        points_N2: float64.
        group_N: which group each point belongs to.
        groups: their names.
        perplexity: as used.
    """

    title: str
    points_N2: NDArray[np.float64]
    group_N: NDArray[np.int64]
    groups: tuple[str, ...]
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the points themselves are left to the picture."""
        counts = np.bincount(self.group_N, minlength=len(self.groups)).tolist()
        return {
            "features": self.title,
            "perplexity": self.perplexity,
            "groups": [{"name": n, "points": c} for n, c in zip(self.groups, counts, strict=True)],
        }


def project(features_ND: Tensor, *, seed: int = 0, perplexity: float = PERPLEXITY) -> tuple[NDArray[np.float64], float]:
    """Two dimensions by scikit-learn's t-SNE (van der Maaten and Hinton 2008), started from the principal components.

    Args:
        features_ND: at least four points.
        seed: of what is random in it.
        perplexity: lowered to a third of the points where these are few.

    Returns:
        Points `[N, 2]` and the perplexity used.

    Raises:
        ValueError: fewer than four points.
    """
    from sklearn.manifold import TSNE

    count = len(features_ND)
    if count < 4:
        raise ValueError(f"t-SNE: expected at least 4 points, found {count}")
    used = min(perplexity, (count - 1) / 3)
    model = TSNE(n_components=2, init="pca", perplexity=used, random_state=seed, learning_rate="auto")
    return model.fit_transform(features_ND.float().cpu().numpy()).astype(np.float64), used


def map_of_collections(
    collections: Sequence[tuple[str, Collection]],
    network: FeatureNetwork,
    *,
    points: int = POINTS,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    batch: int = 256,
) -> Map:
    """Features of `points` images of each collection under one network, projected together.

    Args:
        collections: such as `original`, `selected` and `unselected`, by name.
        network: whose features.
        points: images of each.
        seed: of the choice and of t-SNE.
        perplexity: of t-SNE.
        batch: images at a time.

    Raises:
        ValueError: fewer than four points; DatasetError: images cannot be read.
    """
    parts = [_features(one.part(points, seed), network, batch)[0] for _, one in collections]
    group_N = np.concatenate([np.full(len(part), g, dtype=np.int64) for g, part in enumerate(parts)])
    points_N2, used = project(torch.cat(parts), seed=seed, perplexity=perplexity)
    return Map(network.name, points_N2, group_N, tuple(name for name, _ in collections), used)


def map_of_classes(
    images: Collection,
    network: FeatureNetwork,
    *,
    points: int = POINTS,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    batch: int = 256,
) -> Map:
    """Features of `points` labelled images under a network, coloured by label; unlabelled images are left out.

    Raises:
        ValueError: the collection has no labels, or fewer than four labelled images were chosen.
    """
    if images.classes is None:
        raise ValueError(f"t-SNE by class: {images.name} has no labels; give a labelled image set")
    features_ND, labels_N = _features(images.part(points, seed), network, batch)
    assert labels_N is not None
    known_N = labels_N >= 0
    points_N2, used = project(features_ND[known_N], seed=seed, perplexity=perplexity)
    return Map(network.name, points_N2, labels_N[known_N].numpy(), images.classes, used)


def draw_maps(maps: Sequence[Map], path: Path) -> Path:
    """Maps side by side as PNG; returns the path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure((6.0 * len(maps), 5.5))
    for place, one in enumerate(maps, start=1):
        axes = figure.add_subplot(1, len(maps), place)
        colours = _colours(len(one.groups))
        for g, name in enumerate(one.groups):
            mine_N = one.group_N == g
            axes.scatter(*one.points_N2[mine_N].T, s=6, color=colours[g], label=name, linewidths=0)
        axes.set_title(one.title, fontsize="medium")
        axes.set_xticks([])
        axes.set_yticks([])
        if len(one.groups) <= NAMED_CLASSES:
            axes.legend(markerscale=3, fontsize="small")
    return save_figure(figure, path)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](g) for g in range(count)]
    return [colormaps["hsv"](g / count) for g in range(count)]


def _features(collection: Collection, network: FeatureNetwork, batch: int) -> tuple[Tensor, Tensor | None]:
    features, labels = [], []
    for seen in collection.batches(batch):
        features.append(network.of(seen).float().cpu())
        if seen.labels_N is not None:
            labels.append(seen.labels_N)
    if not features:
        raise ValueError(f"t-SNE: {collection.name} has no images")
    return torch.cat(features), torch.cat(labels) if labels else None
