"""The three-stage CIFAR ResNets of depth 6n + 2, plain (resnet110) and widened (resnet32x4, resnet110x2).

He et al. 2016, Sec. 4.2, with projection shortcuts; names and widths as in RepDistiller ("x4" widens the stem
too) and SimKD ("x2" keeps a stem of 16). `resnet8` is also the small residual network of the quick start.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, conv1x1, conv3x3, init_convs_he, pool_globally

PLAIN = (16, 16, 32, 64)
TWICE = (16, 32, 64, 128)
FOUR_TIMES = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, C_in, H, W] -> [N, C_out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # This family's checkpoints call the projection "downsample", where ResNet-18's call it "shortcut".
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes].

    `depth` is 6n + 2; `widths` are the channels of the stem and of the three stages.
    """

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth of a CIFAR ResNet is 6n + 2 with n >= 1, got {depth}")
        blocks = (depth - 2) // 6
        stem, wide1, wide2, wide3 = widths
        self.conv1 = conv3x3(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, wide1, blocks, stride=1)
        self.layer2 = _stage(wide1, wide2, blocks, stride=2)
        self.layer3 = _stage(wide2, wide3, blocks, stride=2)
        self.fc = nn.Linear(wide3, num_classes)
        init_convs_he(self)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(pool_globally(x))


NETWORKS: dict[str, NetworkBuilder] = {
    "resnet8": partial(CifarResNet, depth=8, widths=PLAIN),
    "resnet20": partial(CifarResNet, depth=20, widths=PLAIN),
    "resnet32": partial(CifarResNet, depth=32, widths=PLAIN),
    "resnet56": partial(CifarResNet, depth=56, widths=PLAIN),
    "resnet110": partial(CifarResNet, depth=110, widths=PLAIN),
    "resnet116": partial(CifarResNet, depth=116, widths=PLAIN),
    "resnet110x2": partial(CifarResNet, depth=110, widths=TWICE),
    "resnet8x4": partial(CifarResNet, depth=8, widths=FOUR_TIMES),
    "resnet32x4": partial(CifarResNet, depth=32, widths=FOUR_TIMES),
}
