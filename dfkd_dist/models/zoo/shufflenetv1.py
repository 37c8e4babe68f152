"""ShuffleNet v1 with three groups for 32 px images: a 1x1 stem and no max-pooling, output stride 8.

Zhang et al. 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", in
the CIFAR form of RepDistiller: stages of 240, 480 and 960 channels, ReLU after the depthwise convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, channel_shuffle, conv1x1, depthwise3x3, pool_globally

STEM_CHANNELS = 24
GROUPS = 3
STAGES = ((240, 4), (480, 8), (960, 4))  # channels, blocks


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    At stride 1 the input is added. At stride 2 it is average-pooled and concatenated, so the convolutions
    make only the `out_channels - in_channels` channels that are missing.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        made = out_channels - in_channels if stride == 2 else out_channels
        hidden = made // 4
        # The stem's few channels are not worth splitting (Sec. 3.2 of the paper).
        self.groups = 1 if in_channels == STEM_CHANNELS else GROUPS
        self.conv1 = conv1x1(in_channels, hidden, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = depthwise3x3(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, made, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit: [N, C_in, H, W] -> [N, C_out, H/stride, W/stride]."""
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return F.relu(out + x)
        pooled = F.avg_pool2d(x, kernel_size=3, stride=2, padding=1)
        return F.relu(torch.cat([out, pooled], dim=1))


class ShuffleNetV1(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        channels = STEM_CHANNELS
        stages = []
        for width, blocks in STAGES:
            rest = (ShuffleUnit(width, width, stride=1) for _ in range(blocks - 1))
            stages.append(nn.Sequential(ShuffleUnit(channels, width, stride=2), *rest))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(pool_globally(x))


NETWORKS: dict[str, NetworkBuilder] = {"shufflenetv1": ShuffleNetV1}
