"""MobileNetV2 at half width for 32 px images (Sandler et al. 2018, with RepDistiller's changes).

Against the paper: stage strides 1, 1, 2, 2, 1, 2, 1 (output stride 16 with the strided stem), ReLU for ReLU6,
an expansion convolution in the first block too, and no dropout. Channels are not rounded to multiples of 8.
The full-width ImageNet form, which Fast-Datafree also calls `mobilenetv2`, is `torchvision/mobilenet_v2`.
"""

from functools import partial

from torch import Tensor, nn

from dfkd_dist.models.zoo.common import (
    NetworkBuilder,
    conv1x1,
    conv3x3,
    depthwise3x3,
    init_convs_he,
    init_linear_normal,
    pool_globally,
)

# (expansion, channels at full width, blocks, stride of the first block)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280


def _conv_bn_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project linearly: [N, C_in, H, W] -> [N, C_out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_conv_bn_relu(conv1x1(in_channels, hidden)),
            *_conv_bn_relu(depthwise3x3(hidden, stride)),
            conv1x1(hidden, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]; `width` scales the channels."""

    def __init__(self, num_classes: int, in_channels: int, *, width: float) -> None:
        super().__init__()
        channels = int(STEM_CHANNELS * width)
        self.conv1 = nn.Sequential(*_conv_bn_relu(conv3x3(in_channels, channels, stride=2)))
        self.blocks = nn.ModuleList()
        for expansion, full_channels, blocks, stride in STAGES:
            out_channels = int(full_channels * width)
            stage = [InvertedResidual(channels, out_channels, stride, expansion)]
            stage += [InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(blocks - 1)]
            self.blocks.append(nn.Sequential(*stage))
            channels = out_channels
        last = int(LAST_CHANNELS * max(1.0, width))
        self.conv2 = nn.Sequential(*_conv_bn_relu(conv1x1(channels, last)))
        linear = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(linear)
        init_convs_he(self)
        init_linear_normal(linear, std=0.01)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = self.conv1(images_NCHW)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(pool_globally(self.conv2(x)))


NETWORKS: dict[str, NetworkBuilder] = {"mobilenetv2": partial(MobileNetV2, width=0.5)}
