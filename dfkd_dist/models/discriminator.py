"""The patch discriminator of MosaicKD: real or made, asked of every L x L patch of an image (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.generator import LEAK

Field = int | Literal["image"]
"""The side L of a patch in pixels, or `image` for the whole image, whatever its size."""


@dataclass(frozen=True)
class Layer:
    """A convolution: side of its kernel, stride, zeros around its input."""

    kernel: int
    stride: int = 1
    padding: int = 0


_HALVING = Layer(4, stride=2, padding=1)

LAYERS: dict[int, tuple[Layer, ...]] = {
    1: (Layer(1),),
    2: (Layer(2),),
    4: (_HALVING,),
    8: (_HALVING, Layer(3, stride=2, padding=1)),
    10: (_HALVING, _HALVING),
    18: (_HALVING, _HALVING, Layer(3, padding=1)),
    22: (_HALVING, _HALVING, _HALVING),
    # No zeros around these: at 32 px there is one score, and it has seen every pixel.
    32: (Layer(2, stride=2), Layer(4, stride=2), Layer(3, stride=2), Layer(3)),
}
"""Convolutions for each patch size of Table 4, and 10, which the released code has; a 1 x 1 convolution follows."""


def whole_image(size: int) -> tuple[Layer, ...]:
    """Convolutions that end in one score about a whole image of `size` px: halve it, then look at all that is left."""
    layers: list[Layer] = []
    while size > 4:
        layers.append(_HALVING)
        size = map_side(layers[-1:], size)
    return (*layers, Layer(size))


def receptive_field(layers: Sequence[Layer]) -> int:
    """Side of the patch that one score depends on: `1 + sum_i (k_i - 1) prod_{j<i} s_j`."""
    field, step = 1, 1
    for layer in layers:
        field += (layer.kernel - 1) * step
        step *= layer.stride
    return field


def patch_origin(layers: Sequence[Layer], place: int) -> int:
    """Pixel at which the patch of the score at `place` of a row (or column) begins; below 0 it lies in the padding."""
    start = place
    for layer in reversed(layers):
        start = start * layer.stride - layer.padding
    return start


def map_side(layers: Sequence[Layer], size: int) -> int:
    """Side of the score map for images of `size` px."""
    for layer in layers:
        size = (size + 2 * layer.padding - layer.kernel) // layer.stride + 1
    return size


class PatchDiscriminator(nn.Module):
    """Images `[N, channels, size, size]` in image space to a map of scores (logits of "real") `[N, 1, P, P]`.

    Each score has seen one patch of `field` x `field` pixels (near the border, the part of it that lies in the image).
    Leaky ReLU after every convolution, batch norm after all but the first, as in PatchGAN (reference 19).

    Args:
        channels: 1 or 3.
        field: L, one of `LAYERS`, or `image`.
        width: channels after the first convolution; doubled by each further one, up to four times as many.
        stride: s, every s-th score of the map is kept in both directions, so that the patches overlap less.
        size: side of the images in pixels.

    Raises:
        ValueError: an unknown field, images smaller than a patch, or a stride that is larger than the map.
    """

    def __init__(self, channels: int, field: Field, width: int, stride: int, size: int) -> None:
        super().__init__()
        layers = _layers(field, size)
        full = map_side(layers, size)
        if not 1 <= stride <= full:
            raise ValueError(
                f"stride is {stride}, but field {field} gives {full} x {full} scores; allowed: 1 to {full}"
            )
        self.layers, self.stride, self.side = layers, stride, -(-full // stride)
        widths = [channels, *(width * min(2**i, 4) for i in range(len(layers)))]
        pairs = list(zip(widths[:-1], widths[1:], layers, strict=True))
        # A bias before batch norm has no effect, and a gradient of rounding errors that Adam would blow up.
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, layer.kernel, layer.stride, layer.padding, bias=i == 0)
            for i, (a, b, layer) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[2:])
        self.to_score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The scores `[N, 1, P, P]` of these images' patches."""
        x = 2.0 * images_NCHW - 1.0  # the same for real and made images, so it tells nothing about which they are
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(x if i == 0 else self.norms[i - 1](x), LEAK)
        scores_N1PP: Tensor = self.to_score(x)
        return scores_N1PP[:, :, :: self.stride, :: self.stride]


def _layers(field: Field, size: int) -> tuple[Layer, ...]:
    if field == "image":
        return whole_image(size)
    if field not in LAYERS:
        raise ValueError(f"field is {field}; allowed: {', '.join(map(str, LAYERS))}, or image")
    if size < field:
        fitting = ", ".join(str(known) for known in LAYERS if known <= size)
        raise ValueError(f"field is {field} px, but images have only {size}; allowed: {fitting}, or image")
    return LAYERS[field]
