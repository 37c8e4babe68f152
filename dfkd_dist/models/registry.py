"""Networks by name: the zoo's by plain name, torchvision's as `torchvision/NAME`, timm's as `timm/NAME`.

What a network is for follows from its name: those in `SEGMENTERS` and `DEEPLABS` classify pixels, all others images.
"""

import difflib
from collections.abc import Callable, Iterable
from types import ModuleType

from torch import nn

from dfkd_dist.models.zoo import (
    deeplab,
    lenet,
    mobilenetv2,
    resnet,
    resnet_cifar,
    shufflenetv1,
    shufflenetv2,
    tiny,
    tinyseg,
    vgg,
    wrn,
)
from dfkd_dist.models.zoo.common import NetworkBuilder

ZOO: dict[str, NetworkBuilder] = {
    **tiny.NETWORKS,
    **lenet.NETWORKS,
    **resnet.NETWORKS,
    **resnet_cifar.NETWORKS,
    **wrn.NETWORKS,
    **vgg.NETWORKS,
    **mobilenetv2.NETWORKS,
    **shufflenetv1.NETWORKS,
    **shufflenetv2.NETWORKS,
}

SEGMENTERS: dict[str, NetworkBuilder] = dict(tinyseg.NETWORKS)
"""The zoo's networks that classify pixels: logits [N, num_classes, H, W]."""

DEEPLABS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "deeplabv3_resnet50": deeplab.deeplabv3_resnet50,
    "deeplabv3_mobilenetv2": deeplab.deeplabv3_mobilenetv2,
}
"""Networks that classify pixels, made of the libraries' parts, whose backbones the libraries have weights for."""

LIBRARIES = ("torchvision", "timm")
# While training these return a tuple with the outputs of auxiliary classifiers, not logits.
_TORCHVISION_WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})


def network_names() -> list[str]:
    """Names of the zoo's classifiers of images, sorted."""
    return sorted(ZOO)


def segmenter_names() -> list[str]:
    """Names of the networks that classify pixels, sorted."""
    return sorted([*SEGMENTERS, *DEEPLABS])


def has_library_weights(arch: str) -> bool:
    """Whether `pretrained: true` has a meaning for it: a library's network, or one over a library's backbone."""
    return "/" in arch or arch in DEEPLABS


def build_network(arch: str, *, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """Build a classifier: images [N, in_channels, H, W] -> logits [N, num_classes], of pixels [N, num_classes, H, W].

    `arch` is a zoo name (`resnet18`), `torchvision/NAME`, `timm/NAME`, or one of `segmenter_names()`.
    `pretrained=True` starts from the library's ImageNet weights (downloaded by the library unless cached) with a fresh
    classifier where the number of classes differs (of a DeepLabV3: its backbone); the zoo has none and loads files
    with `dfkd_dist.models.weights.load_weights`.

    Raises ValueError for an unknown name (with the nearest valid ones), for counts below 1, for `pretrained`
    with a zoo network and for `in_channels != 3` with torchvision; ImportError where timm is not installed.
    """
    for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise ValueError(f"{name} of {arch!r} must be at least 1, got {count}")
    library, _, name = arch.rpartition("/")
    if library == "torchvision":
        return _build_torchvision(name, num_classes, in_channels, pretrained)
    if library == "timm":
        return _build_timm(name, num_classes, in_channels, pretrained)
    if arch in DEEPLABS:
        return DEEPLABS[arch](num_classes, in_channels, pretrained)
    small = ZOO | SEGMENTERS
    if arch not in small:
        others = ", ".join([*(f"{library}/NAME" for library in LIBRARIES), *sorted(DEEPLABS)])
        raise ValueError(f"unknown network {arch!r}: {_nearest(arch, small)}; or {others}")
    if pretrained:
        raise ValueError(
            f"pretrained: true is for torchvision/NAME and timm/NAME (and DeepLabV3); {arch!r} has no library weights, "
            "give a file with weights instead"
        )
    return small[arch](num_classes, in_channels)


def _nearest(name: str, valid: Iterable[str]) -> str:
    """A phrase that proposes the valid names nearest to `name`, or lists them where none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name.lower(), valid, n=5, cutoff=0.5)
    if near:
        return f"nearest names are {', '.join(near)}"
    shown = ", ".join(valid[:40])
    return f"valid names are {shown}" + (f" and {len(valid) - 40} more" if len(valid) > 40 else "")


def _build_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    from torchvision import models  # imported here: the zoo does not need it, and it takes seconds

    valid = set(models.list_models(module=models)) - _TORCHVISION_WITH_AUXILIARY_HEADS
    if name in _TORCHVISION_WITH_AUXILIARY_HEADS:
        raise ValueError(
            f"torchvision/{name} returns auxiliary outputs beside its logits while training, "
            "which no part here expects; choose another network"
        )
    if name not in valid:
        raise ValueError(f"unknown network 'torchvision/{name}': {_nearest(name, valid)}")
    if in_channels != 3:
        raise ValueError(
            f"torchvision/{name} takes 3 channels, got in_channels={in_channels}; timm/NAME and the networks "
            "of the zoo take any number"
        )
    if not pretrained:
        return models.get_model(name, weights=None, num_classes=num_classes)
    network = models.get_model(name, weights="DEFAULT")
    replace_classifier(network, num_classes)
    return network


def replace_classifier(network: nn.Module, num_classes: int) -> None:
    """Give `network` a new classifier in place, if it does not have `num_classes` outputs yet.

    The classifier is the last linear layer or convolution that was registered, as in all of torchvision.
    Raises ValueError if there is none.
    """
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear layer or convolution to replace")
    path, old = layers[-1]
    new: nn.Module
    if isinstance(old, nn.Linear):
        if old.out_features == num_classes:
            return
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        if old.out_channels == num_classes:
            return
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "timm/NAME networks need timm, which is not installed: pip install 'dfkd-dist[timm]'"
        ) from error
    return timm


def _build_timm(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(name):
        raise ValueError(f"unknown network 'timm/{name}': {_nearest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
