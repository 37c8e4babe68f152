"""The generator of DCGAN (Radford et al. 2016), which DFAD takes for segmentation; and every kind by its name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.generator import LEAK, Generator
from dfkd_dist.models.spatial import SpatialGenerator

SPREAD = 0.02
"""Standard deviation of fresh weights, as in DCGAN."""


class TransposedGenerator(nn.Module):
    """Latents `[N, latent]` to images `[N, channels, size, size]` in image space by transposed convolutions.

    A linear layer, then blocks that double the side: 4 x 4 transposed convolution of stride 2, batch norm, leaky ReLU.

    Args:
        latent: length of the latent vector.
        width: channels after the linear layer; halved in each block but the last.
        blocks: how many.
        size: side of the images in pixels, a multiple of 2^blocks.
        channels: 1 or 3.
        head: `sigmoid` (DCGAN's tanh, moved to [0, 1]), or `bn` as in `Generator`.

    Raises:
        ValueError: a size that the blocks do not meet.
    """

    def __init__(self, latent: int, width: int, blocks: int, size: int, channels: int, head: str) -> None:
        super().__init__()
        if size % 2**blocks:
            raise ValueError(
                f"generator.style is dcgan, whose {blocks} blocks double the side; image.size is {size}, allowed: "
                f"multiples of {2**blocks}"
            )
        self.latent, self.width, self.head, self.side = latent, width, head, size // 2**blocks
        self.latent_shape = (latent,)
        widths = [max(width // 2**block, 1) for block in range(blocks)]
        widths.append(widths[-1])
        self.linear = nn.Linear(latent, width * self.side**2)
        self.norm = nn.BatchNorm2d(width)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        # As in Generator: no bias before batch norm.
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=head != "bn")
        self.head_norm = nn.BatchNorm2d(channels, affine=False) if head == "bn" else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, SPREAD)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight, 1.0, SPREAD)

    def forward(self, latents_NZ: Tensor) -> Tensor:
        """Images of these latents."""
        x = self.norm(self.linear(latents_NZ).view(-1, self.width, self.side, self.side))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), LEAK)
        x = self.to_image(x)
        return 0.5 + 0.25 * self.head_norm(x) if self.head_norm is not None else 0.5 + 0.5 * x.tanh()


AnyGenerator = Generator | TransposedGenerator | SpatialGenerator
STYLES: dict[str, type[AnyGenerator]] = {
    "upsample": Generator,
    "dcgan": TransposedGenerator,
    "spatial": SpatialGenerator,
}


def make_generator(
    style: str, latent: int, width: int, blocks: int, size: int, channels: int, head: str
) -> AnyGenerator:
    """A generator of a style: `upsample` (DFQ, DFMF), `dcgan`, or `spatial` (Fast on ImageNet)."""
    return STYLES[style](latent, width, blocks, size, channels, head)
