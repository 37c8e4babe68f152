"""What a student (or an assistant) minimises."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dfkd_dist.config.base import NonNegative, Positive, Spec


class ObjectiveSpec(Spec):
    """What a student (or an assistant) minimises: a row of weights over terms, DFMF Eqs. 1 and 2."""

    kl: NonNegative = 1.0
    vid: NonNegative = 0.0
    l1: NonNegative = 0.0
    at: NonNegative = 0.0
    ce: NonNegative = 0.0
    """Cross-entropy with labels: only with a labelled source."""
    temperature: Positive = 3.0
    kl_scale: Literal["none", "tau2"] = "none"
    """tau2 multiplies KL by the squared temperature (common in the field, not in DFMF)."""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward is KL(teacher || student)."""
    target: Literal["mean_probabilities", "mean_logits", "lowest_entropy"] = "mean_probabilities"
    """How several teachers' answers become the target of kl; l1 compares with their mean logits always."""

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {"kl": self.kl, "vid": self.vid, "l1": self.l1, "at": self.at, "ce": self.ce}

    @model_validator(mode="after")
    def _something_to_minimise(self) -> ObjectiveSpec:
        if not any(self.weights().values()):
            raise ValueError("all weights are 0; give at least one of kl, vid, l1, at, ce a positive weight")
        return self
