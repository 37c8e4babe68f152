"""A student that ends in its teacher's classifier: the last linear layer, copied and frozen (KD3, section 3.3).

Where the student's penultimate features are not as wide as the teacher's, a trainable linear projector stands before
the classifier (the idea is SimKD's); it belongs to the student, is exported with it and counts among its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.models.taps import find_taps


class ProjectedClassifier(nn.Module):
    """Features `[N, in_features]`, projected to `[N, features]` where the widths differ, to logits.

    Args:
        in_features: width of the network's own features.
        features: width of the classifier's input.
        num_classes: C.
    """

    def __init__(self, in_features: int, features: int, num_classes: int) -> None:
        super().__init__()
        self.projector = nn.Identity() if in_features == features else nn.Linear(in_features, features)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Logits `[N, C]`."""
        return self.linear(self.projector(features_ND))


def project(network: nn.Module, features: int, example_NCHW: Tensor) -> None:
    """Replace the last linear layer of `network`, in place, by one that takes `features` numbers from a projector.

    Args:
        network: a fresh classifier.
        features: width of the new classifier's input.
        example_NCHW: an input, to find the layer by.

    Raises:
        ValueError: the network has no linear layer.
    """
    old = last_linear(network, example_NCHW)
    parent, _, child = next(n for n, m in network.named_modules() if m is old).rpartition(".")
    setattr(network.get_submodule(parent), child, ProjectedClassifier(old.in_features, features, old.out_features))


def last_linear(network: nn.Module, example_NCHW: Tensor) -> nn.Linear:
    """The linear layer that runs last.

    Raises:
        ValueError: there is none.
    """
    name = find_taps(network, example_NCHW).classifier
    layer = None if name is None else network.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{type(network).__name__} has no linear classifier")
    return layer


def projected_width(student: nn.Linear, teacher: nn.Linear) -> int | None:
    """The `features` of a card whose network can hold the teacher's classifier; None: the network as it is can."""
    same_width = student.in_features == teacher.in_features
    fits = same_width and (_has_bias(student) or not _has_bias(teacher))
    return None if fits else teacher.in_features


def classifier(network: ImageNetwork) -> nn.Linear:
    """The linear layer whose output is the network's logits.

    Raises:
        ValueError: there is none (a convolution classifies, or something follows the last linear layer).
    """
    name = network.taps.classifier
    layer = network.network.get_submodule(name) if name is not None else None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"network {network.name} has no linear classifier to share")
    said: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: said.append(out))
    was_training = network.training
    try:
        with torch.no_grad():
            logits_NC = network.eval()(_example(network), frozenset({LOGITS})).logits_NC
    finally:
        hook.remove()
        network.train(was_training)
    own_NC = _ordered(network, said[-1])
    if own_NC.shape != logits_NC.shape or not torch.equal(own_NC, logits_NC):
        raise ValueError(
            f"network {network.name}: the output of its last linear layer ({name}) is not its logits, so that layer "
            "is no classifier to share"
        )
    return layer


def share_classifier(student: ImageNetwork, teacher: ImageNetwork) -> None:
    """Give the student the teacher's last linear layer, in place: copied (in the run's class order) and frozen.

    Gradients pass through it to the student's features and leave it as it is.

    Raises:
        ValueError: one of them ends in no linear layer, or the layers differ in shape (see `projected_width`).
    """
    own, other = classifier(student), classifier(teacher)
    if own.weight.shape != other.weight.shape:
        raise ValueError(
            f"the classifier of {teacher.name} takes {other.in_features} features to {other.out_features} classes, "
            f"that of {student.name} {own.in_features} to {own.out_features}"
        )
    if _has_bias(other) and not _has_bias(own):
        raise ValueError(f"the classifier of {teacher.name} has a bias, that of {student.name} has none")
    with torch.no_grad():
        own.weight.copy_(_ordered(teacher, other.weight.T).T)
        if _has_bias(own):
            bias_C = other.bias if _has_bias(other) else torch.zeros_like(own.bias)
            own.bias.copy_(_ordered(teacher, bias_C.unsqueeze(0)).squeeze(0))
    own.requires_grad_(False)


def _has_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _ordered(network: Any, last_NC: Tensor) -> Tensor:
    """Classes in the run's order: a teacher may have them in another."""
    order_C = getattr(network, "class_order", None)
    return last_NC if order_C is None else last_NC[:, order_C]


def _example(network: ImageNetwork) -> Tensor:
    """Images that are not flat, in the network's own size and channels."""
    like, preprocess = network.preprocess.mean, network.preprocess
    shape = (2, preprocess.channels, preprocess.size, preprocess.size)
    count = 2 * preprocess.channels * preprocess.size**2
    return torch.linspace(0, 1, count, device=like.device, dtype=like.dtype).view(shape)
