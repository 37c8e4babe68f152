"""Contrastive model inversion (Fang et al. 2021): each synthetic image should be told from all others.

Two views of an image are crops of it; a head embeds what a teacher's layers say about each. The local view's embedding
is to be most alike to that of its own image's global view, among the global views of the batch and of a memory. Only
the local side receives gradient: in the released code the global side is detached.
"""

import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import directions, full_precision


def own_among_all(local_NE: Tensor, global_ME: Tensor, own_N: Tensor, temperature: float) -> Tensor:
    """``-log softmax_j(cos(local_i, global_j) / tau)[own(i)]`` per local view, ``[N]``.

    Args:
        local_NE: embeddings of local views; of any length, which does not count.
        global_ME: embeddings of the global views of *all* images, those of other ranks included; no gradient.
        own_N: int64, for each local view the row of ``global_ME`` that shows the same image.
        temperature: tau.

    Raises:
        ValueError: embeddings of unequal width, another number of rows than ``own_N``, or tau not above 0.
    """
    _checks.dims("local_NE", local_NE, 2)
    _checks.dims("global_ME", global_ME, 2)
    _checks.positive_temperature(temperature)
    if local_NE.shape[1] != global_ME.shape[1]:
        raise ValueError(f"global_ME: expected width {local_NE.shape[1]} as local_NE, found {global_ME.shape[1]}")
    if own_N.shape != local_NE.shape[:1]:
        raise ValueError(f"own_N: expected {len(local_NE)} rows as local_NE, found shape {tuple(own_N.shape)}")
    local_NE, global_ME = directions(local_NE), directions(global_ME.detach())
    with full_precision(local_NE):
        cosines_NM = local_NE @ global_ME.to(local_NE.dtype).T
    return F.cross_entropy(cosines_NM / temperature, own_N, reduction="none")
