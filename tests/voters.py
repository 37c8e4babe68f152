"""Networks and images for evaluation: untrained networks name one class for everything; these disagree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dfkd_dist.data.datasets import MemoryImageSet, to_image_space
from dfkd_dist.engine.build import Build
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.teacher import Teacher
from tests.image_data import pictures
from tests.recipes import CLASSES, NAMES


def image_set(count: int, classes: Sequence[str] = NAMES) -> MemoryImageSet:
    """Images and labels of all classes, in no simple order."""
    labels_N = (torch.arange(count) * 7 + torch.arange(count) // 3) % CLASSES
    return MemoryImageSet(pictures(count), labels_N, list(classes))


def speak_up(built: Build) -> Build:
    """Centre and scale the logits of every network that answers, so that all classes occur; in place."""
    for network in [*built.teachers, built.side.network]:
        _speak_up(network)
    return built


def _speak_up(network: ImageNetwork) -> None:
    parameter = next(network.parameters())
    pixels = to_image_space(pictures(64, seed=9), parameter.dtype).to(parameter.device)
    was_training = network.training
    last = [m for m in network.network.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        logits_NC = network.eval()(pixels).logits_NC
        mean_C, scale = logits_NC.mean(dim=0), 2.0 / logits_NC.std(dim=0).mean()
        order = network.class_order if isinstance(network, Teacher) else None
        if order is not None:
            mean_C = mean_C[order.argsort()]
        last.bias.sub_(mean_C).mul_(scale)
        last.weight.mul_(scale)
    network.train(was_training)
