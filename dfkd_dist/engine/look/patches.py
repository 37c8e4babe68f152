"""Frechet distance between random square patches of two collections (MosaicKD Table 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dfkd_dist.engine.look.collection import Collection, Seen
from dfkd_dist.engine.look.fid import Fid, distance, warned
from dfkd_dist.engine.look.networks import FeatureNetwork
from dfkd_dist.parallel.randomness import Randomness


def patch_fid(
    real: Collection,
    pool: Collection,
    network: FeatureNetwork,
    side: int,
    *,
    batch: int = 256,
    crops: int = 1,
    seed: int = 0,
) -> Fid:
    """Frechet distance between random square patches of the images.

    Positions are uniform and depend on (seed, side, the image's number) alone. A patch is resized to the network's
    input by the network's own preprocessing. With `side` that of the whole image this is `fid`.

    Args:
        real: the images to compare with.
        pool: the others; of the same size.
        network: whose features.
        side: L, in pixels of the collections' images.
        batch: images at a time.
        crops: patches of each image.
        seed: of the positions.

    Raises:
        ValueError: L is larger than the images, or the collections' sizes differ; else as `fid`.
    """
    sizes: set[int] = set()
    sides = [_patched(one, network, side, batch, crops, seed, sizes) for one in (real, pool)]
    return warned(distance(*sides), real, pool)


def random_patches(seen: Seen, side: int, crops: int, seed: int) -> Tensor:
    """`crops` random patches `[N * crops, C, side, side]` of a batch's images, keyed by the images' numbers.

    Raises:
        ValueError: the images are smaller than `side`.
    """
    images_NCHW = seen.images_NCHW
    height, width = images_NCHW.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise ValueError(f"patch size {side}: allowed: 1 to {min(height, width)}, the images' side")
    randomness, purpose = Randomness(seed), f"look/patch/{side}"
    top_NK = randomness.integers(f"{purpose}/top", seen.numbers_N, height - side + 1, (crops,))
    left_NK = randomness.integers(f"{purpose}/left", seen.numbers_N, width - side + 1, (crops,))
    patches = [
        images_NCHW[n, :, top : top + side, left : left + side]
        for n, (tops, lefts) in enumerate(zip(top_NK.tolist(), left_NK.tolist(), strict=True))
        for top, left in zip(tops, lefts, strict=True)
    ]
    return torch.stack(patches)


def _patched(
    collection: Collection, network: FeatureNetwork, side: int, batch: int, crops: int, seed: int, sizes: set[int]
) -> Iterator[Tensor]:
    """Features of patches; `sizes` learns how large the images were, and refuses a second size."""
    for seen in collection.batches(batch):
        sizes.add(seen.images_NCHW.shape[-1])
        if len(sizes) > 1:
            raise ValueError(f"patch FID: images of both sides must have one size, found {sorted(sizes)}")
        patches_NCHW = random_patches(seen, side, crops, seed)
        yield network.of(Seen(patches_NCHW, None, seen.numbers_N))
