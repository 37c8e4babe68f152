"""What networks say about images, and what travels between the parts of a method.

Shapes: N images, C classes, D channels of a feature map, H W its sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

LOGITS, FEATURES, MAP, BN = "logits", "features", "map", "bn"
"""Names of signals: class scores, penultimate features, the last convolution's map, batch-norm input statistics."""

Need = frozenset[str]
"""Which signals are wanted; only those are computed and sent."""


@dataclass(frozen=True)
class LayerStatistics:
    """First two moments of one batch-norm layer's input, beside those stored in training (DFMF Eq. 3)."""

    mean_C: Tensor
    var_C: Tensor
    stored_mean_C: Tensor
    stored_var_C: Tensor


@dataclass(frozen=True)
class Signals:
    """What one network says about a batch. Signals that were not asked for are None (or empty)."""

    logits_NC: Tensor
    features_ND: Tensor | None = None
    map_NDHW: Tensor | None = None
    bn: list[LayerStatistics] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Images for the student on this rank.

    `count` is the number of valid images over all ranks: what per-sample loss sums are divided by.
    `column_NCHW` are all images of this rank's column of the mesh, which its teachers must answer for.
    """

    images_NCHW: Tensor
    count: int
    column_NCHW: Tensor | None = None
    labels_N: Tensor | None = None
    mask_N: Tensor | None = None
