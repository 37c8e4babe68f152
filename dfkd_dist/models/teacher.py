"""A teacher: a sealed network, and the copy of it that only answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.models.folding import fold_batch_norm
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.signals import LOGITS, Need, Signals


class Teacher(ImageNetwork):
    """A trained network, frozen and in eval mode from construction, whatever happens around it.

    Args:
        network: the trained classifier.
        preprocess: from image space to its input.
        name: its name in the run.
        classes: class names in the network's own order, or None.
        class_order: `[C]` indices that bring its logits into the run's order, or None where they agree.

    Raises:
        ValueError: a parameter or buffer is not finite (named), or a batch norm has no stored statistics, so that an
            answer would depend on which other images are asked about.
    """

    class_order: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        name: str,
        classes: Sequence[str] | None = None,
        class_order: Sequence[int] | None = None,
    ) -> None:
        _refuse_nonfinite(network, name)
        _refuse_batch_dependence(network, name)
        super().__init__(network, preprocess, name)
        self.classes = list(classes) if classes is not None else None
        order = None if class_order is None else torch.tensor(class_order)
        self.register_buffer("class_order", order, persistent=False)
        self.autocast_dtype: torch.dtype | None = None
        """Set by `cast` for networks that cannot be converted layer by layer."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: a frozen network in train mode would still move its running statistics."""
        super().train(False)
        return self

    def forward(self, images_NCHW: Tensor, need: Need = frozenset({LOGITS}), scaled: bool = False) -> Signals:
        """Signals with the logits in the run's class order."""
        with self._autocast(images_NCHW.device):
            signals = super().forward(images_NCHW, need, scaled)
        if self.class_order is None:
            return signals
        return replace(signals, logits_NC=signals.logits_NC[:, self.class_order])

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device.type, self.autocast_dtype)

    def input_dtype(self, images_NCHW: Tensor) -> torch.dtype:
        """The format of the first weight: convolutions may have been cast to bf16."""
        return next(p for p in self.network.parameters() if p.dim() > 1).dtype

    def cast(self, dtype: torch.dtype) -> Teacher:
        """Answer in `dtype` from now on.

        Convolutions and linear layers are converted in place; batch norm keeps its own format for its statistics. A
        network with other kinds of parameters (tokens, layer scales) keeps all of them and runs under autocast.
        """
        known = [m for m in self.network.modules() if isinstance(m, nn.Conv2d | nn.Linear | _BatchNorm)]
        covered = sum(p.numel() for m in known for p in m.parameters(recurse=False))
        if covered < sum(p.numel() for p in self.network.parameters()):
            self.autocast_dtype = dtype
            return self
        for module in known:
            if not isinstance(module, _BatchNorm):
                module.to(dtype)
        return self

    def answering(self, fold: bool = True) -> Teacher:
        """A copy that only answers: batch norm folded into the convolutions. It has no `bn` signal any more."""
        twin = copy.deepcopy(self)
        if fold:
            # The same images on every rank: what can be folded must not depend on who asks.
            seeded = torch.Generator().manual_seed(0)
            shape = (4, self.preprocess.channels, self.preprocess.size, self.preprocess.size)
            example = torch.rand(shape, generator=seeded)
            twin.network = fold_batch_norm(twin.network, self.preprocess(example.to(self.preprocess.mean)))
        return twin


def _refuse_nonfinite(network: nn.Module, name: str) -> None:
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"teacher {name}: tensor {key} holds NaN or infinite values; its weights are damaged")


def _refuse_batch_dependence(network: nn.Module, name: str) -> None:
    for key, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"teacher {name}: batch norm {key} has no stored statistics, so its answers depend on the batch"
            )


def class_order(classes: Sequence[str] | None, reference: Sequence[str] | None, name: str) -> list[int] | None:
    """Indices that bring a teacher's logits into the reference order; None where nothing has to move.

    Raises:
        ValueError: the same number of classes under different names (both lists shown in part).
    """
    if classes is None or reference is None or list(classes) == list(reference):
        return None
    if set(classes) != set(reference) or len(set(classes)) != len(classes):
        extra, missing = sorted(set(classes) - set(reference))[:4], sorted(set(reference) - set(classes))[:4]
        raise ValueError(
            f"teacher {name}: class names differ from the other teachers': only here {extra}, missing {missing}"
        )
    position = {label: i for i, label in enumerate(classes)}
    return [position[label] for label in reference]
