"""Folding batch norm into the convolution before it, for networks that only answer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
        for conv_name, norm_name in _pairs(network, wide):
            conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            _replace(network, conv_name, fuse_conv_bn_eval(conv, norm))
            _replace(network, norm_name, nn.Identity())
            if not torch.allclose(network(wide), reference, rtol=1e-6, atol=1e-8):
                _replace(network, conv_name, conv)
                _replace(network, norm_name, norm)
        network.to(dtype)
    return network


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
        if id(args[0]) in made_by:
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
