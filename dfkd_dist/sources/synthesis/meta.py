"""How something that is copied in every round learns from what became of the copies (Fast's meta-learning)."""

from __future__ import annotations

import torch
from torch import Tensor

from dfkd_dist.config import MetaSpec
from dfkd_dist.parallel.player import Player


class Meta:
    """One player and, in each round, a copy of it: first-order gradients alone.

    Args:
        spec: which gradient the player gets.
    """

    def __init__(self, spec: MetaSpec) -> None:
        self.spec = spec
        self.told: Tensor | None = None
        """What the copy's gradients of this round come to so far, flat; None before the first and for reptile."""

    def begin(self) -> None:
        """A new round."""
        self.told = None

    def tell(self, copy: Player) -> None:
        """The copy has been differentiated."""
        if self.spec.gradient == "reptile":
            return
        earlier = self.told if self.spec.gradient == "sum" else None
        self.told = copy.gradient.clone() if earlier is None else earlier + copy.gradient

    def step(self, player: Player, copy: Player) -> None:
        """One step of the player, after the copy's last one."""
        if self.spec.gradient == "reptile":
            with torch.no_grad():
                for own, other in zip(player.parameters, copy.parameters, strict=True):
                    assert own.grad is not None
                    own.grad.copy_(self.spec.scale * (own - other))
        else:
            assert self.told is not None
            player.gradient.copy_(self.told)
        player.step()
        self.told = None
