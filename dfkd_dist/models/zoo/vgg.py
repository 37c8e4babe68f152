"""VGG with batch norm for small images: five groups of 3x3 convolutions, global pooling, one linear layer.

Simonyan and Zisserman 2015 without the hidden fully connected layers, as in RepDistiller and CMI: three
max-poolings below 64 px, so that the last map of a 32 px image is 4 x 4, and a fourth one from 64 px on.
`vgg11` and `vgg11_bn` name the same network: there is none without batch norm, which data-free methods need.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, init_convs_he, init_linear_normal, pool_globally

WIDTHS = (64, 128, 256, 512, 512)
FOURTH_POOL_FROM_PX = 64


def _group(in_channels: int, out_channels: int, convs: int) -> nn.Sequential:
    """`convs` convolutions with BN and ReLU, without the last ReLU (which the network applies)."""
    layers: list[nn.Module] = []
    for i in range(convs):
        channels = in_channels if i == 0 else out_channels
        layers += [nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)]
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]; `convs` counts the convolutions per group."""

    def __init__(self, num_classes: int, in_channels: int, *, convs: Sequence[int]) -> None:
        super().__init__()
        inputs = (in_channels, *WIDTHS[:-1])
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _group(c_in, c_out, n) for c_in, c_out, n in zip(inputs, WIDTHS, convs, strict=True)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_convs_he(self)
        init_linear_normal(self.classifier, std=0.01)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.max_pool2d(F.relu(self.block0(images_NCHW)), 2)
        x = F.max_pool2d(F.relu(self.block1(x)), 2)
        x = F.max_pool2d(F.relu(self.block2(x)), 2)
        x = F.relu(self.block3(x))
        if images_NCHW.shape[2] >= FOURTH_POOL_FROM_PX:
            x = F.max_pool2d(x, 2)
        return self.classifier(pool_globally(F.relu(self.block4(x))))


_CONVS: dict[str, tuple[int, ...]] = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
}

NETWORKS: dict[str, NetworkBuilder] = {
    name + suffix: partial(VGG, convs=convs) for name, convs in _CONVS.items() for suffix in ("", "_bn")
}
