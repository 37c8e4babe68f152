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
