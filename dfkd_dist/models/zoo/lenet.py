"""LeNet-5 with ReLU and max-pooling, and the half-width student that DAFL paired with it.

LeCun et al. 1998; designed for 32 px. Smaller images are padded with zeros to 32, as the paper pads MNIST's
28 px; on larger ones the last map is averaged over positions. The networks have no batch norm.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.models.zoo.common import NetworkBuilder, pool_globally

SMALLEST_PX = 32


def pad_to_smallest(images_NCHW: Tensor) -> Tensor:
    """Zero-pad height and width, centred, up to 32; larger images are returned as they are."""
    height, width = images_NCHW.shape[2:]
    rows, columns = max(0, SMALLEST_PX - height), max(0, SMALLEST_PX - width)
    if rows == 0 and columns == 0:
        return images_NCHW
    return F.pad(images_NCHW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class LeNet5(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes].

    `widths` are the channels of the three convolutions and the units of the hidden layer.
    """

    def __init__(self, num_classes: int, in_channels: int, *, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        wide1, wide2, wide3, hidden = widths
        self.conv1 = nn.Conv2d(in_channels, wide1, kernel_size=5)
        self.conv2 = nn.Conv2d(wide1, wide2, kernel_size=5)
        self.conv3 = nn.Conv2d(wide2, wide3, kernel_size=5)
        self.fc1 = nn.Linear(wide3, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.max_pool2d(F.relu(self.conv1(pad_to_smallest(images_NCHW))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = pool_globally(F.relu(self.conv3(x)))
        return self.fc2(F.relu(self.fc1(x)))


NETWORKS: dict[str, NetworkBuilder] = {
    "lenet5": partial(LeNet5, widths=(6, 16, 120, 84)),
    "lenet5_half": partial(LeNet5, widths=(3, 8, 60, 42)),
}
