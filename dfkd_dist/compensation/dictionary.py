"""KDCI's confounder dictionary: prototypes of the teachers' logits by PCA and K-Means++ (section 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.exceptions import ConvergenceWarning

Features = NDArray[np.float64]

IN_MEMORY = 20_000
"""Up to so many samples are clustered exactly; more go through in pieces (incremental PCA, mini-batch K-Means)."""
PIECE = 4096
"""Samples of a piece: more than the principal components, as incremental PCA demands, and than the prototypes."""


@dataclass(frozen=True)
class Dictionary:
    """Z and P: `prototypes_Nd` are the clusters' means, `counts_N` their sizes (0 where points coincided)."""

    prototypes_Nd: Features
    counts_N: NDArray[np.int64]


def components(width: int, samples: int, limit: int) -> int:
    """Principal components: min(d, samples - 1, limit), at least one."""
    return max(1, min(width, samples - 1, limit))


def cluster(features_Md: Features, size: int, pca: int, seed: int) -> Dictionary:
    """Cluster one mini-batch exactly.

    Args:
        features_Md: prediction features m_j.
        size: N prototypes.
        pca: largest number of principal components.
        seed: of PCA's and K-Means++'s own random numbers.

    Raises:
        ValueError: fewer samples than prototypes.
    """
    _enough(len(features_Md), size)
    kept = components(features_Md.shape[1], len(features_Md), pca)
    points_MP = PCA(kept, svd_solver="full").fit_transform(features_Md)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some stay empty
        labels_M = KMeans(size, init="k-means++", n_init=1, random_state=seed).fit_predict(points_MP)
    return _means(iter([(features_Md, labels_M)]), size, features_Md.shape[1])


def cluster_pieces(
    pieces: Callable[[], Iterator[Features]], samples: int, size: int, pca: int, seed: int
) -> Dictionary:
    """Cluster a set that may be too large for memory; `pieces` starts a new pass over it in a fixed order.

    Raises:
        ValueError: fewer samples than prototypes.
    """
    _enough(samples, size)
    if samples <= IN_MEMORY:
        return cluster(np.concatenate(list(pieces())), size, pca, seed)
    width = next(pieces()).shape[1]
    projection = IncrementalPCA(components(width, samples, pca))
    clusters = MiniBatchKMeans(size, init="k-means++", n_init=1, random_state=seed)
    for piece in _even(pieces()):
        projection.partial_fit(piece)
    for piece in _even(pieces()):
        clusters.partial_fit(projection.transform(piece))
    labelled = ((piece, clusters.predict(projection.transform(piece))) for piece in _even(pieces()))
    return _means(labelled, size, width)


def _enough(samples: int, size: int) -> None:
    if samples < size:
        raise ValueError(f"compensation.size is {size}, but there are only {samples} samples to cluster")


def _even(pieces: Iterator[Features]) -> Iterator[Features]:
    """The same rows in pieces of at least PIECE, so that every one suffices for a partial fit."""
    held: list[Features] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= 2 * PIECE:  # the rest will be at least PIECE, or joins the last piece
            whole = np.concatenate(held)
            yield whole[:PIECE]
            held, count = [whole[PIECE:]], count - PIECE
    if count:
        yield np.concatenate(held)


def _means(labelled: Iterator[tuple[Features, NDArray[np.int32]]], size: int, width: int) -> Dictionary:
    """Means in the features' own space, not in that of the principal components."""
    sums_Nd, counts_N = np.zeros((size, width)), np.zeros(size, dtype=np.int64)
    for features_md, labels_m in labelled:
        np.add.at(sums_Nd, labels_m, features_md)
        counts_N += np.bincount(labels_m, minlength=size)
    return Dictionary(sums_Nd / np.maximum(counts_N, 1)[:, None], counts_N)
