"""Small networks that classify pixels: for tests and experiments on a CPU. In miniature what DeepLabV3 is.

Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation", Sec. 3.3: dilated convolutions keep
the resolution, parallel branches of several rates (and the image as a whole) see several sizes of objects. Any input
of 4 px or more works; logits have the input's resolution.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, conv1x1, init_convs_he


def _block(in_channels: int, out_channels: int, stride: int = 1, rate: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU; a rate above 1 dilates the convolution."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=rate, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU())


class WholeImage(nn.Module):
    """The branch that sees the image as a whole: [N, C_in, H, W] -> [N, C_out, H, W], the same everywhere."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv1x1(in_channels, out_channels), nn.ReLU())

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        """Without batch norm: there is one position to an image."""
        pooled: Tensor = self.conv(F.adaptive_avg_pool2d(maps_NCHW, 1))
        return pooled.expand(-1, -1, *maps_NCHW.shape[2:])


class TinySeg(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes, H, W].

    `widths` are the channels of the stem (at full resolution), of the trunk (at half of it) and of each branch.
    """

    def __init__(self, num_classes: int, in_channels: int, *, widths: tuple[int, int, int], depth: int) -> None:
        super().__init__()
        stem, trunk, branch = widths
        self.stem = _block(in_channels, stem)
        self.trunk = nn.Sequential(_block(stem, trunk, stride=2), *(_block(trunk, trunk) for _ in range(depth)))
        self.branches = nn.ModuleList(
            [
                _pointwise(trunk, branch),
                _block(trunk, branch, rate=2),
                _block(trunk, branch, rate=4),
                WholeImage(trunk, branch),
            ]
        )
        self.project = _pointwise(4 * branch, trunk)
        self.classifier = nn.Conv2d(trunk, num_classes, 1)
        init_convs_he(self)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes, H, W]."""
        x = self.trunk(self.stem(images_NCHW))
        x = self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        return F.interpolate(self.classifier(x), size=images_NCHW.shape[2:], mode="bilinear", align_corners=False)


NETWORKS: dict[str, NetworkBuilder] = {
    "tinyseg": partial(TinySeg, widths=(12, 24, 16), depth=1),
    "smallseg": partial(TinySeg, widths=(24, 48, 32), depth=2),
}
