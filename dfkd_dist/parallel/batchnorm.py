"""Batch norm over a group of ranks, on any device (torch's SyncBatchNorm refuses CPU tensors)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.statistics import pooled

Mode = Literal["train", "eval", "batch"]
"""train: batch statistics, buffers move; eval: stored statistics; batch: batch statistics, buffers stay."""


class GroupBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the group's whole batch. State dicts are plain batch norm's."""

    def __init__(self, like: _BatchNorm, group: Group) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, False, like.track_running_stats)
        # The very parameters and buffers of `like`, so that whoever holds them goes on holding them.
        self.affine, self.weight, self.bias = like.affine, like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked
        self.train(like.training)
        self.group = group
        self.reading: Mode | None = None
        """Set by `reading_only`: how the layer acts while others read the network."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[N, C, ...]` per channel."""
        mode = self.reading or ("train" if self.training else "eval")
        if mode == "eval" and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        moves = mode == "train" and self.track_running_stats
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.group.size == 1:
            mean, var, rate = (self.running_mean, self.running_var, self._rate()) if moves else (None, None, 0.0)
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, rate, self.eps)
        out, mean_C, var_C, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self.group)
        if moves:
            self._move(mean_C, var_C, count)
        return out

    def _rate(self) -> float:
        """How far the buffers move; without a momentum they become the mean over all steps, as in plain batch norm."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return 1.0 / float(self.num_batches_tracked)

    def _move(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            unbiased_C = var_C * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self._rate())
            self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), self._rate())


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with the group's moments; backward sums over the group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x)
        dims = _others(x)
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        if count:
            var_C, mean_C = torch.var_mean(wide, dim=dims, correction=0)
        else:
            var_C = mean_C = wide.new_zeros(x.shape[1])
        packed = torch.cat([mean_C, var_C, mean_C.new_full((1,), count)])
        channels = x.shape[1]
        parts = torch.stack(group.gather(packed))
        mean_RC, var_RC, count_R1 = parts.split([channels, channels, 1], dim=1)
        mean_C, var_C = pooled(mean_RC, var_RC, count_R1)
        total = count_R1.sum()
        invstd_C = torch.rsqrt(var_C + eps)
        scale_C = invstd_C if weight is None else invstd_C * weight
        shift_C = -mean_C * scale_C if bias is None else bias - mean_C * scale_C
        out = torch.addcmul(_column(shift_C, x), wide, _column(scale_C, x)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean_C, invstd_C, total)
        ctx.group = group
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return out, mean_C, var_C, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, invstd_C, total = ctx.saved_tensors
        grad, wide = _wide(grads[0]), _wide(x)
        dims, channels = _others(x), x.shape[1]
        centred = wide - _column(mean_C, x)
        own_bias_C = grad.sum(dim=dims)
        own_weight_C = (grad * centred).sum(dim=dims) * invstd_C
        sums = ctx.group.sum_(torch.cat([own_bias_C, own_weight_C]))
        mean_grad_C, mean_grad_xhat_C = (sums / total).split(channels)
        scale_C = invstd_C if weight is None else invstd_C * weight
        slope_C = invstd_C * mean_grad_xhat_C
        grad_x = (grad - _column(mean_grad_C, x) - centred * _column(slope_C, x)) * _column(scale_C, x)
        grad_weight, grad_bias = (None, None) if weight is None else (own_weight_C, own_bias_C)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _column(value_C: Tensor, like: Tensor) -> Tensor:
    return value_C.view(1, -1, *[1] * (like.dim() - 2))


def synchronise(module: nn.Module, group: Group) -> nn.Module:
    """Replace every batch norm in `module` by one over `group`, in place; returns the module.

    Parameters and buffers stay the same objects. A layer that stands in several places stays one layer. Where
    `module` is itself a batch norm, its replacement is returned.
    """
    return _synchronised(module, group, {})


def _synchronised(module: nn.Module, group: Group, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = GroupBatchNorm(module, group) if isinstance(module, _BatchNorm) else module
    # Not named_children(): it leaves out the second name of a layer.
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _synchronised(child, group, done)
    return done[module]


@contextmanager
def reading_only(module: nn.Module, mode: Literal["eval", "batch"], group: Group = ALONE) -> Iterator[None]:
    """Others read the network: no parameter gets gradient, no buffer moves, whatever mode it is in.

    Args:
        module: a network whose batch norms went through `synchronise`.
        mode: stored statistics, or those of the batch at hand.
        group: who shares that batch (mode `batch`).
    """
    norms = [m for m in module.modules() if isinstance(m, GroupBatchNorm)]
    trainable = [p for p in module.parameters() if p.requires_grad]
    was_training, groups = module.training, [m.group for m in norms]
    module.eval()
    for p in trainable:
        p.requires_grad_(False)
    for m in norms:
        m.reading, m.group = mode, group
    try:
        yield
    finally:
        module.train(was_training)
        for p in trainable:
            p.requires_grad_(True)
        for m, own in zip(norms, groups, strict=True):
            m.reading, m.group = None, own
