"""A generator for large images: its latents have places, so that it needs no linear layer over all of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.generator import LEAK


class SpatialGenerator(nn.Module):
    """Latents `[N, latent, size / 2^blocks, size / 2^blocks]` to images `[N, channels, size, size]` in image space.

    A convolution with batch norm and leaky ReLU, then blocks of nearest-neighbour upsampling and the same (Fast's
    generator for ImageNet has four, of widths 128, 128, 64, 64 and 64).

    Args:
        latent: channels of the latents.
        width: channels after the first convolution and the first block; halved from the second block on.
        blocks: how many. Each doubles the side, rounding so that any size is met.
        size: side of the images in pixels.
        channels: 1 or 3.
        head: `sigmoid`, or `bn` as in `Generator`.
    """

    def __init__(self, latent: int, width: int, blocks: int, size: int, channels: int, head: str) -> None:
        super().__init__()
        sides = [size]
        for _ in range(blocks):
            sides.append((sides[-1] + 1) // 2)
        self.sides, self.width = sides[::-1], width
        self.latent, self.latent_shape = latent, (latent, sides[-1], sides[-1])
        widths = [latent, width, *[width if block == 0 else max(width // 2, 1) for block in range(blocks)]]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        # As in Generator: no bias before batch norm.
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=head != "bn")
        self.head_norm = nn.BatchNorm2d(channels, affine=False) if head == "bn" else None

    def forward(self, latents_NZHW: Tensor) -> Tensor:
        """Images of these latents."""
        x = latents_NZHW
        for conv, norm, side in zip(self.convs, self.norms, self.sides, strict=True):
            if x.shape[-1] != side:
                x = F.interpolate(x, size=(side, side), mode="nearest")
            x = F.leaky_relu(norm(conv(x)), LEAK)
        x = self.to_image(x)
        return 0.5 + 0.25 * self.head_norm(x) if self.head_norm is not None else x.sigmoid()
