"""KD3: the student aligns its features with one teacher's, in front of the teacher's own classifier."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dfkd_dist.config.base import Count, NonNegative, Positive, Spec


class KD3Spec(Spec):
    """The loss of "Distribution Shift Matters for Knowledge Distillation with Webly Collected Images" (KD3, Eq. 18).

    `align * L_wfa + mdcl * (L^S + L^T)`. The other alpha of the paper, alpha(t) of Eq. 4, belongs to the choice of
    images: `source.selection` with kind kd3.
    """

    kind: Literal["kd3"]
    align: NonNegative = 1.0
    """Weight of the feature alignment (Eq. 10): 1 in Eq. 18."""
    mdcl: NonNegative = 0.01
    """The trade-off alpha of Eq. 18, on the contrast between clean and perturbed images (Eq. 17)."""
    reduction: Literal["mean", "sum"] = "mean"
    """How the contrast adds up its images: Eqs. 15 and 16 print a sum, where Eq. 10 prints a mean. Both are logged."""
    temperature: Positive = 0.3
    """tau of Eqs. 15 and 16."""
    denominator: Literal["others", "all"] = "others"
    """others leaves out j = i, as printed; all holds the positive too, the usual InfoNCE."""
    perturb: Literal["mixdistribution", "mixup", "none"] = "mixdistribution"
    """How the second version of an image is made; mixup is Table 2's "No MD", none contrasts images with themselves."""
    delta: Positive = 0.1
    """lambda of Eq. 11 is drawn from Beta(delta, delta); not given in the paper (MixStyle's value)."""
    head: Count = 128
    """Width of the embeddings (rows of W_p in Eqs. 13 and 14); not given in the paper."""
    shared_head: bool = False
    """One head for both networks. As printed each has its own, and L^T trains nothing but the teacher's."""
    cross: NonNegative = 0.0
    """Weight, within `mdcl`, of a third contrast: the student's clean image with the teacher's perturbed ones."""
    classifier: Literal["shared", "hard", "soft"] = "shared"
    """shared: the teacher's, copied and frozen (Eq. 2). hard, soft: the student's own, trained towards the teacher's
    one-hot predictions (cross-entropy) or soft labels (KL): Table 2's "No classifier sharing"."""
    classifier_weight: Positive = 1.0
    """hard, soft: weight of that term."""
    classifier_temperature: Positive = 1.0
    """soft: of both networks' predictions."""

    @property
    def views(self) -> int:
        """Versions of an image that a batch must hold."""
        return 2 if self.mdcl > 0 and self.perturb != "none" else 1

    @property
    def shares_classifier(self) -> bool:
        """Whether the student ends in the teacher's classifier."""
        return self.classifier == "shared"

    @property
    def equal_features(self) -> bool:
        """Whether the student's features must be as wide as the teacher's, by a projector where they are not."""
        return self.shares_classifier or self.align > 0 or (self.mdcl > 0 and self.shared_head)

    @property
    def compares_predictions(self) -> bool:
        """Whether some term compares the predictions of the two networks."""
        return not self.shares_classifier

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        own = {"hard": 0.0, "soft": 0.0}
        if self.classifier != "shared":
            own[self.classifier] = self.classifier_weight
        contrasts = {"mdcl_student": self.mdcl, "mdcl_teacher": self.mdcl, "mdcl_cross": self.mdcl * self.cross}
        return {"wfa": self.align, **contrasts, **own}

    def check_recipe(self, *, teachers: int, source: str, batch: int) -> None:
        """Refuse what a recipe with this objective cannot be.

        Args:
            teachers: how many.
            source: its kind.
            batch: images of a student's step.

        Raises:
            ValueError: names the key, what was found and what is allowed.
        """
        if teachers != 1:
            raise ValueError(
                f"teachers: objective.kind: kd3 needs exactly 1 (its student takes over one teacher's classifier and "
                f"aligns its features with that teacher's), found {teachers}"
            )
        if self.views > 1 and source != "stream":
            raise ValueError(
                f"source.kind is {source!r}; objective.kind: kd3 compares two versions of each image, which only "
                "source.kind: stream makes (objective.mdcl: 0 needs one version)"
            )
        if self.mdcl > 0 and batch < 2:
            raise ValueError(
                f"batch is {batch}; objective.mdcl > 0 contrasts images with each other: allowed: 2 or more"
            )

    @model_validator(mode="after")
    def _something_to_learn(self) -> KD3Spec:
        if not any(self.weights().values()):
            raise ValueError(
                "align and mdcl are 0 and the classifier is frozen, so the student has nothing to minimise"
            )
        if self.cross > 0 and self.mdcl == 0:
            raise ValueError(f"cross is {self.cross:g} but mdcl, which it is a part of, is 0")
        return self
