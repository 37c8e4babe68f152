"""The generator of DFQ and DFMF: one linear layer, then nearest-neighbour upsampling and convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LEAK = 0.2


class Generator(nn.Module):
    """Latents `[N, latent]` to images `[N, channels, size, size]` in image space (DFMF section 4.1, after DFQ).

    Args:
        latent: length of the latent vector.
        width: channels after the linear layer; the last upsampling block halves them.
        blocks: upsampling blocks. Each doubles the side, rounding so that any size is met (28 px: 4, 7, 14, 28).
        size: side of the images in pixels.
        channels: 1 or 3.
        head: `sigmoid`, or `bn`: 0.5 + 0.25 x batch norm without affine parameters, unclamped (DAFL, ZSKT, DFAD).
    """

    def __init__(self, latent: int, width: int, blocks: int, size: int, channels: int, head: str) -> None:
        super().__init__()
        sides = [size]
        for _ in range(blocks):
            sides.append((sides[-1] + 1) // 2)
        self.latent, self.width, self.head = latent, width, head
        self.latent_shape = (latent,)
        self.sides = sides[::-1]
        self.linear = nn.Linear(latent, width * self.sides[0] ** 2)
        self.norm = nn.BatchNorm2d(width)
        widths = [width] * blocks + [max(width // 2, 1)]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        # A bias before batch norm has no effect, and a gradient of rounding errors that Adam would blow up.
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=head != "bn")
        self.head_norm = nn.BatchNorm2d(channels, affine=False) if head == "bn" else None

    def forward(self, latents_NZ: Tensor) -> Tensor:
        """Images of these latents."""
        side = self.sides[0]
        x = self.norm(self.linear(latents_NZ).view(-1, self.width, side, side))
        for conv, norm, side in zip(self.convs, self.norms, self.sides[1:], strict=True):
            x = F.interpolate(x, size=(side, side), mode="nearest")
            x = F.leaky_relu(norm(conv(x)), LEAK)
        x = self.to_image(x)
        return 0.5 + 0.25 * self.head_norm(x) if self.head_norm is not None else x.sigmoid()
