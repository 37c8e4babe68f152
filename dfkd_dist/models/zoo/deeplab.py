"""DeepLabV3 (Chen et al. 2017) over the backbones of DFAD's and MosaicKD's segmentation: ResNet-50, MobileNetV2.

The parts are the libraries' own; parameter names of the first are torchvision's. Dropout in the head is off: it would
draw from a generator that knows nothing of ranks and resumes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class DeepLabV3(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes, H, W].

    Args:
        backbone: images to maps; a mapping (its `out`), a list (its last) or the map itself.
        classifier: map to logits at its own resolution.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes, H, W]: upsampled to the images, as in torchvision."""
        logits_NChw = self.classifier(_last(self.backbone(images_NCHW)))
        return F.interpolate(logits_NChw, size=images_NCHW.shape[2:], mode="bilinear", align_corners=False)


def _last(said: Any) -> Tensor:
    if isinstance(said, dict):
        said = said["out"]
    map_NDHW: Tensor = said[-1] if isinstance(said, list) else said
    return map_NDHW


def deeplabv3_resnet50(num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    """torchvision's, at an eighth of the resolution, without the auxiliary head; 3 channels only.

    Args:
        num_classes: C.
        in_channels: 3.
        pretrained: start from torchvision's ImageNet weights of the backbone (downloaded by torchvision unless cached).

    Raises:
        ValueError: other than 3 channels.
    """
    from torchvision.models import ResNet50_Weights, segmentation  # imported here: it takes seconds

    if in_channels != 3:
        raise ValueError(f"deeplabv3_resnet50 takes 3 channels, got in_channels={in_channels}")
    whole = segmentation.deeplabv3_resnet50(
        weights=None,
        weights_backbone=ResNet50_Weights.IMAGENET1K_V1 if pretrained else None,
        num_classes=num_classes,
        aux_loss=False,
    )
    return DeepLabV3(whole.backbone, whole.classifier)


def deeplabv3_mobilenetv2(num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    """timm's `mobilenetv2_100` at an eighth of the resolution under torchvision's DeepLabV3 head.

    At 256 px that is 5.2 billion multiply-adds; MosaicKD's Table 2 says 5.54 (at a sixteenth it would be 1.4).

    Args:
        num_classes: C.
        in_channels: any number.
        pretrained: start from timm's ImageNet weights of the backbone (downloaded by timm unless cached).

    Raises:
        ImportError: timm is not installed (says how to install it).
    """
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "deeplabv3_mobilenetv2 needs timm, which is not installed: pip install 'dfkd-dist[timm]'"
        ) from error
    backbone: Any = timm.create_model(
        "mobilenetv2_100",
        features_only=True,
        output_stride=8,
        out_indices=(4,),
        pretrained=pretrained,
        in_chans=in_channels,
    )
    return DeepLabV3(backbone, DeepLabHead(backbone.feature_info.channels()[-1], num_classes))
