"""FitNets (Romero et al. 2015): the student's map, through a regressor, should be the teacher's."""

from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32


def hint(regressed_NDHW: Tensor, teacher_NDHW: Tensor) -> Tensor:
    """Mean over D, H and W of the squared difference, ``[N]`` (FitNets, Eq. 3).

    The paper has half the sum. A mean, as in the field's code (where the weight is 100), keeps one weight usable
    for maps of every size. The regressor is learnable and lives with the student.

    Raises:
        ValueError: shapes differ.
    """
    _checks.same_shape("regressed_NDHW", regressed_NDHW, "teacher_NDHW", teacher_NDHW)
    difference = at_least_fp32(regressed_NDHW) - at_least_fp32(teacher_NDHW)
    return difference.square().flatten(1).mean(dim=1)
