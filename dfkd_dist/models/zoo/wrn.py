"""Wide residual networks with pre-activation, `wrn{depth}_{width}` (Zagoruyko and Komodakis 2016)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, conv1x1, conv3x3, init_convs_he, pool_globally


class PreactBlock(nn.Module):
    """BN-ReLU-conv twice, plus a shortcut: [N, C_in, H, W] -> [N, C_out, H/stride, W/stride].

    Where the width changes, the shortcut projects the *activated* input; elsewhere it is the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        # Spelled as in every public wide-ResNet checkpoint.
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class Stage(nn.Module):
    """`blocks` pre-activation blocks; the first one changes width and resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreactBlock(in_channels, out_channels, stride)
        rest = (PreactBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in order."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]; `depth` is 6n + 4, no dropout."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, widen: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth of a wide ResNet is 6n + 4 with n >= 1, got {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = Stage(16, 16 * widen, blocks, stride=1)
        self.block2 = Stage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = Stage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_convs_he(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(images_NCHW))))
        return self.fc(pool_globally(F.relu(self.bn1(x))))


NETWORKS: dict[str, NetworkBuilder] = {
    f"wrn{depth}_{widen}": partial(WideResNet, depth=depth, widen=widen)
    for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2))
}
