"""Listening to a network's inner signals with hooks that never outlive one forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.models.signals import BN, FEATURES, MAP, NAMED_MAP, LayerStatistics, Need

_NOT_A_MAP = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.Flatten,
)


@dataclass(frozen=True)
class Taps:
    """Where a network's signals are found, as module names."""

    map: str | None
    """The module whose output is the last feature map `[N, D, H, W]` before pooling."""
    classifier: str | None
    """The last linear layer; its input is the penultimate feature `[N, D]`."""
    batch_norms: tuple[str, ...]
    """Batch-norm layers with stored statistics, in the order in which they run."""


@dataclass
class Heard:
    """What the hooks caught during one forward pass."""

    features_ND: Tensor | None = None
    map_NDHW: Tensor | None = None
    bn: list[LayerStatistics] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)


def find_taps(network: nn.Module, example_NCHW: Tensor) -> Taps:
    """Run the network once (in eval mode, without gradients) and see where its signals are.

    The map is the output of the last module to finish with a 4-D output that is no pooling layer: for a residual net
    its last stage, after the last addition.
    """
    finished: list[tuple[str, bool]] = []
    linears: list[str] = []
    norms: list[str] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, nn.Linear):
            linears.append(name)
        if isinstance(module, _BatchNorm) and module.track_running_stats and name not in norms:
            norms.append(name)
        finished.append((name, isinstance(output, Tensor) and output.dim() == 4 and not isinstance(module, _NOT_A_MAP)))

    was_training = network.training
    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            if name:
                hook = module.register_forward_hook(lambda m, _, out, name=name: note(name, m, out))
                hooks.callback(hook.remove)
        network.eval()(example_NCHW)
    network.train(was_training)
    maps = [name for name, is_map in finished if is_map]
    return Taps(maps[-1] if maps else None, linears[-1] if linears else None, tuple(norms))


@contextmanager
def listen(network: nn.Module, taps: Taps, need: Need) -> Iterator[Heard]:
    """Hooks for the signals in `need`, removed on leaving.

    Raises:
        ValueError: the network has no such signal.
    """
    heard = Heard()
    with ExitStack() as hooks:
        if FEATURES in need:
            classifier = _module(network, taps.classifier, "a linear classifier (signal `features`)")
            hooks.callback(
                classifier.register_forward_pre_hook(lambda _, args: _set(heard, "features_ND", args[0])).remove
            )
        if MAP in need:
            last = _module(network, taps.map, "a convolution map (signal `map`)")
            hooks.callback(last.register_forward_hook(lambda _, __, out: _set(heard, "map_NDHW", out)).remove)
        if BN in need:
            if not taps.batch_norms:
                raise ValueError("the bn term needs batch norm with stored statistics, and this network has none")
            for name in taps.batch_norms:
                norm = network.get_submodule(name)
                hooks.callback(
                    norm.register_forward_pre_hook(lambda m, args: heard.bn.append(_moments(m, args[0]))).remove
                )
        for name in sorted(n.removeprefix(NAMED_MAP) for n in need if n.startswith(NAMED_MAP)):
            module = _named_module(network, name)
            hooks.callback(module.register_forward_hook(lambda _, __, out, n=name: heard.maps.update({n: out})).remove)
        yield heard


def _named_module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in network.named_modules() if n]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise ValueError(f"{type(network).__name__} has no module {name!r}; nearest: {', '.join(near)}") from None


def _module(network: nn.Module, name: str | None, what: str) -> nn.Module:
    if name is None:
        raise ValueError(f"{type(network).__name__} has no {what}")
    return network.get_submodule(name)


def _set(heard: Heard, name: str, value: Tensor) -> None:
    setattr(heard, name, value)


def _moments(norm: nn.Module, x: Tensor) -> LayerStatistics:
    """Mean and biased variance over all but the channel dimension, at no less than fp32."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    wide = x if x.dtype == torch.float64 else x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    var_C, mean_C = torch.var_mean(wide, dim=dims, correction=0)
    return LayerStatistics(mean_C, var_C, norm.running_mean, norm.running_var)
