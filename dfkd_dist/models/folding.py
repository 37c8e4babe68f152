"""Folding batch norm into the convolution before it, for networks that only answer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-9
"""Of the largest logit. A right fold is exact to 1e-13; a wrong one moves even a fresh network by about 1e-6."""


def fold_batch_norm(network: nn.Module, example: Tensor) -> nn.Module:
    """Replace each (convolution, batch norm) pair that follows directly by one convolution, in place.

    Pairs are found by running the network: a batch norm whose input is the very tensor a convolution returned. A pair
    whose tensor is used elsewhere too (pre-activation shortcuts) must stay; folding it would change the answer, which
    is how it is recognised.

    Args:
        network: a network in eval mode.
        example: input `[N, C, H, W]` for the trial runs.
    """
    wide = example.double()
    with torch.no_grad():
        dtype = next(network.parameters()).dtype
        network.double()
        reference = network(wide)
        _fold(network, _pairs(network, wide), wide, reference, TOLERANCE * float(reference.abs().max()))
        network.to(dtype)
    return network


def _fold(network: nn.Module, pairs: list[tuple[str, str]], wide: Tensor, reference: Tensor, atol: float) -> None:
    """Fold the pairs that may be folded: all at once, or in halves where that changes the answer."""
    if not pairs:
        return
    before = [(name, network.get_submodule(name)) for pair in pairs for name in pair]
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        _replace(network, conv_name, fuse_conv_bn_eval(conv, norm))
        _replace(network, norm_name, nn.Identity().eval())
    if torch.allclose(network(wide), reference, rtol=0.0, atol=atol):
        return
    for name, module in before:
        _replace(network, name, module)
    if len(pairs) > 1:
        middle = len(pairs) // 2
        _fold(network, pairs[:middle], wide, reference, atol)
        _fold(network, pairs[middle:], wide, reference, atol)


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) that run once each, the second on the first's own output."""
    made_by: dict[int, str] = {}
    keep: list[Tensor] = []  # keeps outputs alive, so that an id is not given twice
    pairs: list[tuple[str, str]] = []
    runs: dict[str, int] = {}

    def after_conv(name: str, output: Any) -> None:
        keep.append(output)
        made_by[id(output)] = name
        runs[name] = runs.get(name, 0) + 1

    def before_norm(name: str, args: tuple[Any, ...]) -> None:
        runs[name] = runs.get(name, 0) + 1
        norm = network.get_submodule(name)
        if id(args[0]) in made_by and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            pairs.append((made_by[id(args[0])], name))

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_hook(lambda _, __, out, name=name: after_conv(name, out))
                hooks.callback(hook.remove)
            elif isinstance(module, nn.BatchNorm2d):
                pre = module.register_forward_pre_hook(lambda _, args, name=name: before_norm(name, args))
                hooks.callback(pre.remove)
        network(example)
    return [(conv, norm) for conv, norm in pairs if runs[conv] == runs[norm] == 1]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
