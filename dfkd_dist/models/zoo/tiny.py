"""A convolutional network small enough to train on a CPU in seconds: for tests and the digits quick start."""

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, conv3x3, init_convs_he, pool_globally

WIDTHS = (24, 48, 96)


class TinyNet(nn.Module):
    """Three conv-BN-ReLU blocks of strides 1, 2, 2.

    Images [N, in_channels, H, W] -> logits [N, num_classes].
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        wide1, wide2, wide3 = WIDTHS
        self.conv1 = conv3x3(in_channels, wide1)
        self.bn1 = nn.BatchNorm2d(wide1)
        self.conv2 = conv3x3(wide1, wide2, stride=2)
        self.bn2 = nn.BatchNorm2d(wide2)
        self.conv3 = conv3x3(wide2, wide3, stride=2)
        self.bn3 = nn.BatchNorm2d(wide3)
        self.fc = nn.Linear(wide3, num_classes)
        init_convs_he(self)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(pool_globally(x))


NETWORKS: dict[str, NetworkBuilder] = {"tiny": TinyNet}
