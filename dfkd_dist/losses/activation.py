"""The activation term: real images excite the penultimate features of a network, noise does not."""

from torch import Tensor

from dfkd_dist.losses._numerics import at_least_fp32


def activation(features_ND: Tensor) -> Tensor:
    """Minus the mean absolute activation per sample, ``[N]`` (``act``; DAFL); minimised: large ones."""
    return -at_least_fp32(features_ND).abs().flatten(1).mean(dim=1)
