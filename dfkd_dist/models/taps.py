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

from dfkd_dist.models.signals import BN, FEATURES, MAP, MEANS, NAMED_MAP, NAMED_MEANS, LayerStatistics, Need

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
    """The last linear layer; its input is the penultimate feature `[N, D]`. In a network that classifies pixels the
    convolution that gives their logits; its input is the penultimate feature `[N, D, H, W]`."""
    batch_norms: tuple[str, ...]
    """Batch-norm layers with stored statistics, in the order in which they run."""
    dense: bool = False
    """Whether it classifies pixels: logits `[N, C, H, W]`."""


@dataclass
class Heard:
    """What the hooks caught during one forward pass."""

    features_ND: Tensor | None = None
    map_NDHW: Tensor | None = None
    bn: list[LayerStatistics] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    means: list[Tensor] = field(default_factory=list)

    @property
    def means_ND(self) -> Tensor | None:
        """Those of all layers, one after another."""
        return torch.cat(self.means, dim=1) if self.means else None


def find_taps(network: nn.Module, example_NCHW: Tensor) -> Taps:
    """Run the network once (in eval mode, without gradients) and see where its signals are.

    The map is the output of the last module to finish with a 4-D output that is no pooling layer: for a residual net
    its last stage, after the last addition. In a network that classifies pixels it is the last one before the
    convolution that classifies, which is the last with as many outputs as there are classes.
    """
    finished: list[tuple[str, bool]] = []
    linears: list[str] = []
    convolutions: dict[int, tuple[str, int]] = {}
    norms: list[str] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, nn.Linear):
            linears.append(name)
        if isinstance(module, nn.Conv2d):
            convolutions[module.out_channels] = name, len(finished)
        if isinstance(module, _BatchNorm) and module.track_running_stats and name not in norms:
            norms.append(name)
        finished.append((name, isinstance(output, Tensor) and output.dim() == 4 and not isinstance(module, _NOT_A_MAP)))

    was_training = network.training
    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            if name:
                hook = module.register_forward_hook(lambda m, _, out, name=name: note(name, m, out))
                hooks.callback(hook.remove)
        logits_NC = network.eval()(example_NCHW)
    network.train(was_training)
    dense, classifier = logits_NC.dim() == 4, linears[-1] if linears else None
    if dense:
        classifier, place = convolutions.get(logits_NC.shape[1], (None, len(finished)))
        finished = finished[:place]
    maps = [name for name, is_map in finished if is_map]
    return Taps(maps[-1] if maps else None, classifier, tuple(norms), dense)


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
        for module in _averaged(network, taps, need):
            hooks.callback(
                module.register_forward_pre_hook(lambda _, args: heard.means.append(_channel_means(args[0]))).remove
            )
        for name in sorted(n.removeprefix(NAMED_MAP) for n in need if n.startswith(NAMED_MAP)):
            module = _named_module(network, name)
            hooks.callback(module.register_forward_hook(lambda _, __, out, n=name: heard.maps.update({n: out})).remove)
        yield heard


def _averaged(network: nn.Module, taps: Taps, need: Need) -> list[nn.Module]:
    """Modules whose inputs' channel means are wanted."""
    named = sorted(n.removeprefix(NAMED_MEANS) for n in need if n.startswith(NAMED_MEANS))
    if MEANS in need and not taps.batch_norms:
        raise ValueError("the signal `means` needs batch norm with stored statistics, and this network has none")
    norms = [network.get_submodule(name) for name in taps.batch_norms] if MEANS in need else []
    return norms + [_named_module(network, name) for name in named]


def _channel_means(x_NDHW: Tensor) -> Tensor:
    """`[N, D, ...]` to `[N, D]`, at no less than fp32."""
    wide = x_NDHW if x_NDHW.dtype == torch.float64 else x_NDHW.float()
    return wide.flatten(2).mean(dim=2) if wide.dim() > 2 else wide


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
