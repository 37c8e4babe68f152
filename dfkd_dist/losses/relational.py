"""Relational knowledge distillation (Park et al. 2019): relations between images rather than the images' features.

Batch-coupled: the features must be those of the *global* batch. Where ranks hold unequal numbers of images, a mask
says which rows are images; the others count for nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, directions, full_precision

_ELEMENTS = 1 << 26
"""Numbers that may be held for the angles at some of the images; those at the others are then computed anew in the
backward pass."""


def distance(student_ND: Tensor, teacher_ND: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """RKD-D, a scalar: Huber loss between distances, each divided by its network's mean distance.

    The mean over ordered pairs of different images; the paper writes a sum, its code a mean (over all N^2, which with
    the N zeros of the diagonal is smaller by (N - 1) / N). Both means have gradient where their features have.

    Args:
        student_ND: features of the student.
        teacher_ND: of the teacher; another width is fine.
        mask_N: true where a row is an image.

    Returns:
        0 where there are no two images.

    Raises:
        ValueError: not matrices, or unequal numbers of rows.
    """
    student_ND, teacher_ND, mask_N = _checked(student_ND, teacher_ND, mask_N)
    pairs_NN = _pairs(mask_N)
    count = pairs_NN.sum().clamp_min(1)
    own_NN, other_NN = (_normalised(_distances(f), pairs_NN, count) for f in (student_ND, teacher_ND))
    return (_huber(own_NN, other_NN) * pairs_NN).sum() / count


def angle(student_ND: Tensor, teacher_ND: Tensor, mask_N: Tensor | None = None, elements: int = _ELEMENTS) -> Tensor:
    """RKD-A, a scalar: Huber loss between the cosines of the angles in all triples of images.

    The mean over ordered triples of different images. Two images with the same features span no angle: its cosine
    counts as 0. Arguments and errors as in :func:`distance`; it returns 0 where there are no three images.

    Time is N^3 D. With ``elements`` numbers filled by the N^2 (D + N) of all vertices, the vertices are taken in
    parts, each computed again in the backward pass, so that memory stays bounded.
    """
    student_ND, teacher_ND, mask_N = _checked(student_ND, teacher_ND, mask_N)
    pairs_NN = _pairs(mask_N)
    count = mask_N.sum()
    triples = (count * (count - 1) * (count - 2)).clamp_min(1)
    size = len(mask_N)
    width = student_ND.shape[1] + teacher_ND.shape[1] + size
    rows = max(1, elements // max(1, size * width))
    parts = range(0, max(size, 1), rows)
    total = student_ND.new_zeros(())
    for start in parts:
        given = (student_ND, teacher_ND, pairs_NN, start, start + rows)
        if len(parts) == 1:
            total = total + _angles_at(*given)
        else:
            total = total + checkpoint(_angles_at, *given, use_reentrant=False, preserve_rng_state=False)
    return total / triples


def _angles_at(student_ND: Tensor, teacher_ND: Tensor, pairs_NN: Tensor, start: int, stop: int) -> Tensor:
    """The sum over the triples whose vertex is one of the rows ``start`` to ``stop``."""
    legs_JN = pairs_NN[start:stop]
    triples_JNN = legs_JN.unsqueeze(1) * legs_JN.unsqueeze(2) * pairs_NN
    return (_huber(_cosines(student_ND, start, stop), _cosines(teacher_ND, start, stop)) * triples_JNN).sum()


def _cosines(features_ND: Tensor, start: int, stop: int) -> Tensor:
    """``[J, N, N]``: at vertex j, between the legs to i and to k."""
    legs_JND = directions(features_ND.unsqueeze(0) - features_ND[start:stop].unsqueeze(1))
    with full_precision(features_ND):
        return legs_JND @ legs_JND.transpose(1, 2)


def _distances(features_ND: Tensor) -> Tensor:
    """Euclidean, ``[N, N]``; without the shortcut by a product of matrices, whose rounding errors are square roots."""
    return torch.cdist(features_ND, features_ND, compute_mode="donot_use_mm_for_euclid_dist")


def _normalised(distances_NN: Tensor, pairs_NN: Tensor, count: Tensor) -> Tensor:
    """Distances in units of their mean; where all are zero there is no unit, and zero they remain."""
    mean = (distances_NN * pairs_NN).sum() / count
    return distances_NN / torch.where(mean > 0, mean, 1.0)


def _huber(a: Tensor, b: Tensor) -> Tensor:
    """``(a - b)^2 / 2`` up to a difference of 1, then its tangent, element by element."""
    return F.smooth_l1_loss(a, b, reduction="none")


def _pairs(mask_N: Tensor) -> Tensor:
    """1 for every ordered pair of different images, else 0, ``[N, N]``."""
    return mask_N.unsqueeze(0) * mask_N.unsqueeze(1) * (1 - torch.eye(len(mask_N), device=mask_N.device))


def _checked(student_ND: Tensor, teacher_ND: Tensor, mask_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both in at least fp32, and the mask as numbers."""
    _checks.dims("student_ND", student_ND, 2)
    _checks.dims("teacher_ND", teacher_ND, 2)
    student_ND, teacher_ND = at_least_fp32(student_ND), at_least_fp32(teacher_ND)
    _checks.same_shape("student's rows", student_ND[:, 0], "teacher's rows", teacher_ND[:, 0])
    given = student_ND.new_ones(len(student_ND)) if mask_N is None else mask_N.to(student_ND.dtype)
    _checks.same_shape("student's rows", student_ND[:, 0], "mask_N", given)
    return student_ND, teacher_ND, given
