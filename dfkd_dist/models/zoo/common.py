"""What the families of the zoo share: the constructor's type, convolutions, pooling and initialisation."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

NetworkBuilder = Callable[[int, int], nn.Module]
"""A constructor called as `builder(num_classes, in_channels)`."""


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Pointwise convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, groups=groups, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def depthwise3x3(channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that filters every channel on its own."""
    return conv3x3(channels, channels, stride=stride, groups=channels)


def pool_globally(maps_NCHW: Tensor) -> Tensor:
    """Average over positions: [N, C, H, W] -> [N, C]."""
    return F.adaptive_avg_pool2d(maps_NCHW, 1).flatten(1)


def channel_shuffle(maps_NCHW: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups (Zhang et al. 2018, "ShuffleNet", Sec. 3.1); shape kept."""
    n, c, h, w = maps_NCHW.shape
    return maps_NCHW.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def init_convs_he(network: nn.Module) -> None:
    """He et al. 2015 normal initialisation (fan-out) of every convolution; biases to zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linear_normal(linear: nn.Linear, std: float) -> None:
    """Weights from N(0, std^2), bias zero."""
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
