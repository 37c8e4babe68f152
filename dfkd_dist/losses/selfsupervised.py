"""Knowledge distillation meets self-supervision (SSKD; Xu et al. 2020).

A head on each network's features says how alike images are. Transformed images (here: rotated ones) should be most
alike to their own upright version among all those of the *global* batch: by this the teacher's head learns, and the
whole matrix of similarities is what the student imitates. Of the images that the teacher gets wrong, only those that
it gets least wrong are used.

Rows stand in a fixed order on all ranks: ``M`` samples with ``V - 1`` transformed versions each. A mask says which
samples are there.
"""

import torch
from torch import Tensor

from dfkd_dist.losses import _checks
from dfkd_dist.losses._numerics import at_least_fp32, directions, full_precision, kl_of_log_probs


def similarity(embedded_MVE: Tensor) -> Tensor:
    """Cosines between transformed and upright images, ``[M * (V - 1), M]``.

    Args:
        embedded_MVE: outputs of a head for every version of every sample, the upright one first.

    Raises:
        ValueError: not three dimensions, or no transformed version.
    """
    _checks.dims("embedded_MVE", embedded_MVE, 3)
    if embedded_MVE.shape[1] < 2:
        raise ValueError(f"embedded_MVE: expected at least 2 versions, found {embedded_MVE.shape[1]}")
    unit_MVE = directions(embedded_MVE)
    with full_precision(unit_MVE):
        return unit_MVE[:, 1:].flatten(0, 1) @ unit_MVE[:, 0].T


def own_sample(similarity_RM: Tensor) -> Tensor:
    """For each row of a similarity matrix, which column is its own sample, int64 ``[R]``."""
    rows, samples = similarity_RM.shape
    return torch.arange(samples, device=similarity_RM.device).repeat_interleave(rows // max(samples, 1))


def self_supervision(similarity_RM: Tensor, temperature: float, mask_M: Tensor | None = None) -> Tensor:
    """Cross-entropy of each transformed image's similarities to its own sample, a scalar mean.

    Args:
        similarity_RM: from :func:`similarity`.
        temperature: tau (the released code has 1).
        mask_M: true where there is a sample.

    Returns:
        0 where there are no samples.
    """
    log_p_RM = _log_softmax(similarity_RM, temperature, mask_M)
    loss_R = -log_p_RM.gather(1, own_sample(similarity_RM).unsqueeze(1)).squeeze(1)
    return masked_mean(loss_R, _rows(similarity_RM, mask_M))


def transfer(
    student_RM: Tensor, teacher_RM: Tensor, temperature: float, keep_R: Tensor, mask_M: Tensor | None = None
) -> Tensor:
    """``tau^2 KL(teacher's similarities || student's)``, a scalar mean over the rows kept.

    Args:
        student_RM: similarities of the student.
        teacher_RM: of the teacher; without gradient.
        temperature: tau of the softmax over samples.
        keep_R: which rows count; see :func:`least_wrong`.
        mask_M: true where there is a sample.

    Returns:
        0 where no row is kept.
    """
    _checks.same_shape("student_RM", student_RM, "teacher_RM", teacher_RM)
    log_q_RM = _log_softmax(student_RM, temperature, mask_M)
    log_p_RM = _log_softmax(teacher_RM.detach(), temperature, mask_M)
    return temperature**2 * masked_mean(kl_of_log_probs(log_p_RM, log_q_RM), keep_R)


def rank_of_truth(scores_RC: Tensor, truth_R: Tensor) -> Tensor:
    """How many scores are higher than that of the truth, int64 ``[R]``: 0 where the prediction is right.

    Of equal scores, those at lower places count as higher.
    """
    _checks.dims("scores_RC", scores_RC, 2)
    own_R1 = scores_RC.gather(1, truth_R.unsqueeze(1))
    before_RC = torch.arange(scores_RC.shape[1], device=scores_RC.device) < truth_R.unsqueeze(1)
    return ((scores_RC > own_R1) | ((scores_RC == own_R1) & before_RC)).sum(dim=1)


def least_wrong(ranks_R: Tensor, share: float, valid_R: Tensor | None = None) -> Tensor:
    """Which rows to keep, bool ``[R]``: all right ones, and the given share of the wrong ones.

    Wrong ones are taken from the lowest rank up, at one rank in the order of the rows; their number is rounded down.

    Args:
        ranks_R: from :func:`rank_of_truth`, of the global batch.
        share: from 0 to 1.
        valid_R: true where a row is there.

    Raises:
        ValueError: a share that is not from 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: expected a number from 0 to 1, found {share!r}")
    valid_R = torch.ones_like(ranks_R, dtype=torch.bool) if valid_R is None else valid_R
    absent = torch.iinfo(ranks_R.dtype).max
    order_R = torch.where(valid_R, ranks_R, absent).argsort(stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    wrong = (valid_R & (ranks_R > 0)).sum()
    kept = valid_R.sum() - wrong + (wrong.double() * share).floor().long()
    return valid_R & (place_R < kept)


def masked_mean(values_R: Tensor, mask_R: Tensor) -> Tensor:
    """Mean of the values under the mask, a scalar; 0 where there are none."""
    _checks.same_shape("values_R", values_R, "mask_R", mask_R)
    return torch.where(mask_R, values_R, 0.0).sum() / mask_R.sum().clamp_min(1)


def _rows(similarity_RM: Tensor, mask_M: Tensor | None) -> Tensor:
    """Which rows belong to a sample that is there."""
    own_R = own_sample(similarity_RM)
    return torch.ones_like(own_R, dtype=torch.bool) if mask_M is None else mask_M[own_R]


def _log_softmax(similarity_RM: Tensor, temperature: float, mask_M: Tensor | None) -> Tensor:
    """Over the samples that are there."""
    _checks.dims("similarity_RM", similarity_RM, 2)
    _checks.positive_temperature(temperature)
    scores_RM = at_least_fp32(similarity_RM) / temperature
    if mask_M is not None:
        # Finite, so that a row of absent samples alone has a gradient; far enough to weigh exactly 0 otherwise.
        scores_RM = torch.where(mask_M, scores_RM, -1e4)
    return torch.log_softmax(scores_RM, dim=1)
