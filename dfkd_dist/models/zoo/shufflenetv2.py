"""ShuffleNet v2 at width 1x for 32 px images: a 1x1 stem and no max-pooling, output stride 8.

Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", in the CIFAR form
of RepDistiller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, channel_shuffle, conv1x1, depthwise3x3, pool_globally

STEM_CHANNELS = 24
STAGES = ((116, 3), (232, 7), (464, 3))  # channels, blocks after the down-sampling one
LAST_CHANNELS = 1024
BRANCHES = 2


class DownUnit(nn.Module):
    """Two strided branches, concatenated and shuffled: [N, C_in, H, W] -> [N, C_out, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // BRANCHES
        self.conv1 = depthwise3x3(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = F.relu(self.bn3(self.conv3(x)))
        long = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(long)))))
        return channel_shuffle(torch.cat([short, long], dim=1), BRANCHES)


class SplitUnit(nn.Module):
    """One half of the channels passes, the other half is filtered; concatenated and shuffled. Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // BRANCHES
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise3x3(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        passed, filtered = x.chunk(BRANCHES, dim=1)
        filtered = F.relu(self.bn1(self.conv1(filtered)))
        filtered = F.relu(self.bn3(self.conv3(self.bn2(self.conv2(filtered)))))
        return channel_shuffle(torch.cat([passed, filtered], dim=1), BRANCHES)


class ShuffleNetV2(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        channels = STEM_CHANNELS
        stages = []
        for width, blocks in STAGES:
            rest = (SplitUnit(width) for _ in range(blocks))
            stages.append(nn.Sequential(DownUnit(channels, width), *rest))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = conv1x1(channels, LAST_CHANNELS)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(pool_globally(x))


NETWORKS: dict[str, NetworkBuilder] = {"shufflenetv2": ShuffleNetV2}
