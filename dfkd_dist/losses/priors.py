"""What natural images are expected to look like: smooth (`tv`, `tv_l1`) and not too bright (`l2`).

DeepInversion computes them on images in the network's normalised space. Differences are taken between neighbours in
four directions: to the right, down, and along both diagonals.
"""

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32


def tv_squares(images_NCHW: Tensor) -> Tensor:
    """Sums of squared differences in the four directions over all images, ``[4]``; what :func:`tv` wants.

    Raises:
        ValueError: not four dimensions, or images of a single row or column.
    """
    return torch.stack([difference.square().sum() for difference in _differences(images_NCHW)])


def tv(squares_4: Tensor) -> Tensor:
    """``sum_d ||x - shift_d(x)||_2``, a scalar (DeepInversion's total variation).

    Norms over the *whole batch*, as in the released code, so the sums of squares must be those of the global batch. The
    gradient of a direction without differences is zero.
    """
    _checks.dims("squares_4", squares_4, 1)
    return norm_of_squares(squares_4).sum()


def norm_of_squares(squares: Tensor) -> Tensor:
    """Square roots whose gradient at zero is zero."""
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)


def tv_l1(images_NCHW: Tensor) -> Tensor:
    """Mean absolute difference, summed over the four directions, per image: ``[N]`` (DeepInversion's l1 variant)."""
    return torch.stack([d.abs().flatten(1).mean(dim=1) for d in _differences(images_NCHW)]).sum(dim=0)


def l2(images_NCHW: Tensor) -> Tensor:
    """``||x||_2`` of each image, ``[N]``; the gradient of a black one (zeros) is zero."""
    return norm_of_squares(l2_squares(images_NCHW))


def l2_squares(images_NCHW: Tensor) -> Tensor:
    """``||x||_2^2`` of each image, ``[N]``; the norm of a batch is the root of their sum."""
    _checks.dims("images_NCHW", images_NCHW, 4)
    return at_least_fp32(images_NCHW).square().flatten(1).sum(dim=1)


def _differences(images_NCHW: Tensor) -> list[Tensor]:
    _checks.dims("images_NCHW", images_NCHW, 4)
    if min(images_NCHW.shape[2:]) < 2:
        raise ValueError(f"images_NCHW: expected at least 2 x 2 pixels, found shape {tuple(images_NCHW.shape)}")
    x = at_least_fp32(images_NCHW)
    return [
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    ]
