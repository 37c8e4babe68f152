"""Further versions of a batch's images, for objectives that compare several versions of each."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dfkd_dist.config import KD3Spec, Spec, SSKDSpec
from dfkd_dist.losses import kd3
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.statistics import gather_rows


class ViewMaker(Protocol):
    """Makes further versions of images; an image's versions do not depend on the number of ranks."""

    def __call__(self, images_NCHW: Tensor, slots_N: Tensor, round: int, step: int) -> list[Tensor]:
        """The versions after the images themselves, each `[N, C, H, W]`.

        Args:
            images_NCHW: this rank's valid images; perhaps none.
            slots_N: their places in the global batch.
            round: of the batch.
            step: of the batch.
        """
        ...


class PartnerViews:
    """KD3's perturbed images: each is mixed with another image of the global batch (Eqs. 11 and 12).

    Partners go round one random circle of all valid images, so that every image is some other's partner once and
    none is its own (where there are two). An image's share lambda is drawn from Beta(delta, delta).

    Args:
        kind: `mixdistribution` mixes means and deviations of channels; `mixup` mixes the images themselves.
        delta: of the Beta distribution.
        group: the ranks that share a global batch.
        randomness: keyed by (round, step, slot).
        batch: slots of a global batch.
    """

    def __init__(self, kind: str, delta: float, group: Group, randomness: Randomness, batch: int) -> None:
        self.kind, self.delta, self.group, self.randomness = kind, delta, group, randomness
        self.padded = -(-batch // group.size)

    def __call__(self, images_NCHW: Tensor, slots_N: Tensor, round: int, step: int) -> list[Tensor]:
        """One version."""
        lambda_N = self.randomness.beta("views/lambda", slots_N, self.delta, self.delta, round=round, step=step)
        if self.kind == "mixup":
            partner_NF = self._partners(images_NCHW.flatten(1), slots_N, round, step)
            return [kd3.mixup(images_NCHW, partner_NF.view_as(images_NCHW).to(images_NCHW.dtype), lambda_N)]
        statistics_NF = torch.cat(kd3.channel_statistics(images_NCHW), dim=1)
        mean_NC, std_NC = self._partners(statistics_NF, slots_N, round, step).chunk(2, dim=1)
        return [kd3.mix_distribution(images_NCHW, mean_NC, std_NC, lambda_N)]

    def _partners(self, rows_NF: Tensor, slots_N: Tensor, round: int, step: int) -> Tensor:
        """The rows of each image's partner."""
        # Slots travel with the rows, in a type that holds both exactly.
        packed = torch.cat([rows_NF.double(), slots_N.double().unsqueeze(1)], dim=1)
        everyone_MF, valid_M = gather_rows(packed, self.group, self.padded)
        slots_M, rows_MF = everyone_MF[:, -1].long(), everyone_MF[:, :-1]
        partner_M = self._circle(slots_M, valid_M, round, step)
        start = self.padded * self.group.rank if self.group.size > 1 else 0
        return rows_MF[partner_M[start : start + len(rows_NF)]]

    def _circle(self, slots_M: Tensor, valid_M: Tensor, round: int, step: int) -> Tensor:
        """For each valid place, the place that follows it in a random circle of all valid ones."""
        keys_M = self.randomness.integers("views/partner", slots_M, 2**62, round=round, step=step)
        order_M = torch.where(valid_M, keys_M, 2**62).argsort(stable=True)
        following_M = (torch.arange(len(order_M), device=order_M.device) + 1) % valid_M.sum().clamp_min(1)
        return torch.empty_like(order_M).scatter_(0, order_M, order_M[following_M])


class RotatedViews:
    """SSKD's transformed images: each turned by 90, 180 and 270 degrees."""

    def __call__(self, images_NCHW: Tensor, slots_N: Tensor, round: int, step: int) -> list[Tensor]:
        """Three versions."""
        return [images_NCHW.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)]


def make_views(objective: Spec, group: Group, randomness: Randomness, batch: int) -> ViewMaker | None:
    """What an objective's section asks for, or None.

    Args:
        objective: the recipe's section.
        group: the ranks that share a global batch.
        randomness: counter-based.
        batch: slots of a global batch.
    """
    if isinstance(objective, KD3Spec) and objective.views > 1:
        return PartnerViews(objective.perturb, objective.delta, group, randomness, batch)
    if isinstance(objective, SSKDSpec):
        return RotatedViews()
    return None
