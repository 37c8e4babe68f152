"""Small trainable heads that live on the student's (or an assistant's) side and are not exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VIDHead(nn.Module):
    """Variational information distillation: predicts a teacher's map from a student's (Ahn et al. 2019, Eqs. 4-5).

    Three 1x1 convolutions give the Gaussian's mean; its variance is one learnable value per channel.

    Args:
        in_channels: channels of the student's map.
        out_channels: channels of the teacher's map.
        initial_rho: where the variance parameter starts (`losses.vid.initial_rho`).
    """

    def __init__(self, in_channels: int, out_channels: int, initial_rho: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )
        self.rho = nn.Parameter(torch.full((out_channels,), initial_rho))

    def forward(self, map_NDHW: Tensor) -> Tensor:
        """The mean `[N, out_channels, H, W]`."""
        return self.mean(map_NDHW)


class MapRegressor(nn.Module):
    """FitNet's regressor: one convolution from a student's map to the shape of a teacher's (Romero et al. 2015).

    Equal sizes need a 1x1 kernel. A map twice as large takes 3x3 with stride 2, one half as large 4x4 transposed with
    stride 2, as in the field's code; else the kernel makes up the difference, as in the paper.

    Args:
        own: `(D, H, W)` of the student's map.
        other: the same of the teacher's.
        activation: `none`, or `relu` at the end.
        normalise: batch norm after the convolution.

    Raises:
        ValueError: one map is larger in height and smaller in width.
    """

    def __init__(
        self, own: tuple[int, ...], other: tuple[int, ...], activation: str = "none", normalise: bool = True
    ) -> None:
        super().__init__()
        (channels, height, width), (out, other_height, other_width) = own, other
        bias = not normalise  # batch norm takes it away
        shrink = (height - other_height, width - other_width)
        self.convolution: nn.Conv2d | nn.ConvTranspose2d
        if (height, width) == (2 * other_height, 2 * other_width):
            self.convolution = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=bias)
        elif (2 * height, 2 * width) == (other_height, other_width):
            self.convolution = nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=bias)
        elif min(shrink) >= 0:
            self.convolution = nn.Conv2d(channels, out, (1 + shrink[0], 1 + shrink[1]), bias=bias)
        elif max(shrink) <= 0:
            self.convolution = nn.ConvTranspose2d(channels, out, (1 - shrink[0], 1 - shrink[1]), bias=bias)
        else:
            raise ValueError(
                f"no regressor leads from a map of {height}x{width} to one of {other_height}x{other_width}"
            )
        self.norm = nn.BatchNorm2d(out) if normalise else nn.Identity()
        self.relu = activation == "relu"

    def forward(self, map_NDHW: Tensor) -> Tensor:
        """`[N, D, H, W]` of the student to the shape of the teacher's."""
        out_NDHW = self.norm(self.convolution(map_NDHW))
        return out_NDHW.relu() if self.relu else out_NDHW


class ProjectionHead(nn.Sequential):
    """Two linear layers with a ReLU between them: SSKD's self-supervised head, and CMI's for its contrast.

    Args:
        width: of the features, and of the layer in between.
        out: of the result; null is `width`.
    """

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out or width))

    def forward(self, features_ND: Tensor) -> Tensor:
        """`[N, width]` to `[N, out]`."""
        weight = next(self.parameters())
        return super().forward(features_ND.to(weight.dtype))
