"""The game between a generator and a patch discriminator over maps of scores (MosaicKD, Eqs. 3 and 4).

A score is the logit of D(patch), the probability that a patch is real. Every function takes scores `[N, ...]` (any
map behind N) and returns one value for each image, `[N]`:

* `mean` over the image's patches, which is Eq. 3's expectation over patches: the term weighs the same at every patch
  size, stride and image size;
* `sum` over them, as in the released code, where the term grows with the number of patches (64 at 32 px).

The logarithms are computed from the logits, so values and gradients are finite and exact at scores of any size.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32

Form = Literal["non_saturating", "saturating"]
Reduction = Literal["mean", "sum"]


def real(scores: Tensor, reduction: Reduction) -> Tensor:
    """``-log D(x')`` over the patches of real images, ``[N]``: what the discriminator minimises (Eq. 3, first term)."""
    return _over_patches(-F.logsigmoid(at_least_fp32(scores)), reduction)


def fake(scores: Tensor, reduction: Reduction) -> Tensor:
    """``-log(1 - D(G(z)))`` over the patches of made images, ``[N]`` (Eq. 3, second term, for the discriminator)."""
    return _over_patches(-F.logsigmoid(-at_least_fp32(scores)), reduction)


def generator(scores: Tensor, form: Form, reduction: Reduction) -> Tensor:
    """What the generator minimises so that its patches pass for real ones, ``[N]``.

    ``non_saturating``: ``-log D(G(z))``, which has a gradient where the discriminator wins.
    ``saturating``: ``log(1 - D(G(z)))``, as Eqs. 3 and 4 print it; at most 0.
    """
    _checks.one_of("form", form, ("non_saturating", "saturating"))
    if form == "non_saturating":
        return real(scores, reduction)
    return -fake(scores, reduction)


def discriminator_weight(reduction: Reduction) -> float:
    """Weight of both of the discriminator's terms: 1 (Eq. 3), or the released code's half with sums over patches."""
    return 0.5 if reduction == "sum" else 1.0


def _over_patches(values: Tensor, reduction: Reduction) -> Tensor:
    _checks.one_of("reduction", reduction, ("mean", "sum"))
    if values.dim() < 2:
        raise ValueError(f"scores: expected [N, ...] with a map of scores for each image, found {tuple(values.shape)}")
    flat_NP = values.flatten(1)
    return flat_NP.mean(dim=1) if reduction == "mean" else flat_NP.sum(dim=1)
