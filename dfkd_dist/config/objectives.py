"""What a student (or an assistant) minimises."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dfkd_dist.config.base import Count, Fraction, NonNegative, Positive, Spec
from dfkd_dist.config.kd3 import KD3Spec

KIND = "distillation"
"""The kind of an objective that names none."""


class FitNetSpec(Spec):
    """Which maps the term `hint` compares, and through what (FitNets, Eq. 3)."""

    student: str = "map"
    """`map` is the last convolution's; else the name of a module of the student, such as `block2`."""
    teacher: str = "map"
    """The same in every teacher."""
    normalise: bool = True
    """Batch norm in the regressor, as in the field's code. The paper has none, but then the field's weight of 100
    diverges at the field's learning rates."""
    activation: Literal["none", "relu"] = "none"
    """After the regressor. The paper takes that of the teacher's layer: relu where its map is never negative."""


class ContrastSpec(Spec):
    """The memory of the term `crd` (CRD, section 3.2, and its released code)."""

    dim: Count = 128
    """Width of both networks' embeddings."""
    negatives: Count = 16_384
    """N: rows that an image is told from."""
    temperature: Positive = 0.07
    momentum: Fraction = 0.5
    """How much of a row stays when its image is seen again."""


class ObjectiveSpec(Spec):
    """A row of weights over distillation terms: DFMF Eqs. 1 and 2, and the baselines of out-of-domain distillation."""

    kind: Literal["distillation"] = "distillation"
    kl: NonNegative = 1.0
    vid: NonNegative = 0.0
    l1: NonNegative = 0.0
    at: NonNegative = 0.0
    ce: NonNegative = 0.0
    """Cross-entropy with labels: only where the images have labels of the run's classes."""
    hint: NonNegative = 0.0
    """FitNet: squared error between the teacher's map and the student's, regressed."""
    rkd_d: NonNegative = 0.0
    """RKD-D: distances between images (25 in the paper)."""
    rkd_a: NonNegative = 0.0
    """RKD-A: angles in triples of images (50 in the paper)."""
    crd: NonNegative = 0.0
    """CRD: contrast with a memory of all samples of a stream (0.8 in its released code)."""
    temperature: Positive = 3.0
    kl_scale: Literal["none", "tau2"] = "none"
    """tau2 multiplies KL by the squared temperature (common in the field, not in DFMF)."""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """forward is KL(teacher || student)."""
    target: Literal["mean_probabilities", "mean_logits", "lowest_entropy"] = "mean_probabilities"
    """How several teachers' answers become the target of kl; l1 compares with their mean logits always."""
    fitnet: FitNetSpec = FitNetSpec()
    contrast: ContrastSpec = ContrastSpec()

    @property
    def views(self) -> int:
        """Versions of an image that a batch must hold."""
        return 1

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {name: getattr(self, name) for name in TERM_NAMES}

    def check_recipe(self, *, teachers: int, source: str, batch: int) -> None:
        """Refuse what a recipe with this objective cannot be.

        Args:
            teachers: how many.
            source: its kind.
            batch: images of a student's step.

        Raises:
            ValueError: names the key, what was found and what is allowed.
        """
        if self.crd > 0 and source != "stream":
            raise ValueError(
                f"objective.crd is {self.crd:g}, but source.kind is {source!r}; crd remembers every sample of a set, "
                "which only source.kind: stream has"
            )

    @model_validator(mode="after")
    def _something_to_minimise(self) -> ObjectiveSpec:
        if not any(self.weights().values()):
            raise ValueError(f"all weights are 0; give at least one of {', '.join(TERM_NAMES)} a positive weight")
        return self


TERM_NAMES = ("kl", "vid", "l1", "at", "ce", "hint", "rkd_d", "rkd_a", "crd")
"""Terms of `ObjectiveSpec` in the order in which they are computed."""


class NoisySpec(Spec):
    """DFND's noisy distillation: KL to the teachers, and cross-entropy through a learned noise matrix to their guess.

    Two presets: (kl, temperature) = (4, 1) as KDCI's Appendix G has it, and (1, 4) with the factor 16 as in the
    released code.
    """

    kind: Literal["noisy"]
    kl: NonNegative = 1.0
    noisy: NonNegative = 1.0
    """Weight of the cross-entropy."""
    temperature: Positive = 4.0
    kl_scale: Literal["none", "tau2"] = "tau2"
    """tau2 multiplies KL by the squared temperature."""
    accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """The noise matrix's diagonal: how often the teachers (together) are right. No data tells it; their owner may
    (DFND had 0.9523 on CIFAR-10 and 0.7774 on CIFAR-100)."""
    noise_rate: Positive = 10.0
    """How many times the student's learning rate the noise matrix learns at."""

    @property
    def views(self) -> int:
        """Versions of an image that a batch must hold."""
        return 1

    def weights(self) -> dict[str, float]:
        """Term name to weight."""
        return {"kl": self.kl, "noisy": self.noisy}

    def check_recipe(self, *, teachers: int, source: str, batch: int) -> None:
        """As `ObjectiveSpec.check_recipe`."""
        if teachers == 0:
            raise ValueError("teachers: at least one is needed by objective.kind: noisy")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> NoisySpec:
        if not any(self.weights().values()):
            raise ValueError("all weights are 0; give kl or noisy a positive weight")
        return self


class SSKDSpec(Spec):
    """SSKD: distillation on upright and rotated images, and of how a self-supervised head relates the two.

    Defaults are those of its released code, without the cross-entropy (0.1) that needs labels.
    """

    kind: Literal["sskd"]
    kl: NonNegative = 0.9
    """KL on the images as they are."""
    tf: NonNegative = 2.7
    """KL on the transformed (rotated) images."""
    ss: NonNegative = 10.0
    """KL between the two networks' similarities of transformed with upright images."""
    head: Positive = 1.0
    """Weight of the loss that the teacher's self-supervised head learns by; no other part has gradient from it."""
    temperature: Positive = 4.0
    """Of kl and tf, which are multiplied by its square."""
    ss_temperature: Positive = 0.5
    """Of ss, which is multiplied by its square."""
    keep_tf: Fraction = 1.0
    """How many of the transformed images that a teacher gets wrong are kept, the least wrong first."""
    keep_ss: Fraction = 0.75
    """The same for images whose own upright version is not the most similar one to the teacher's head."""
    head_rounds: Count | None = None
    """Main rounds in which the teacher's head learns, without ss; then it stands still. null: it learns throughout,
    with ss from the start."""

    @property
    def views(self) -> int:
        """Versions of an image that a batch must hold: turned by 0, 90, 180 and 270 degrees."""
        return 4

    def weights(self) -> dict[str, float]:
        """Term name to weight; the head has nothing to learn for where ss is 0."""
        return {"kl": self.kl, "tf": self.tf, "ss": self.ss, "head": self.head if self.ss > 0 else 0.0}

    def check_recipe(self, *, teachers: int, source: str, batch: int) -> None:
        """As `ObjectiveSpec.check_recipe`."""
        if source != "stream":
            raise ValueError(
                f"source.kind is {source!r}; objective.kind: sskd compares rotated versions of each image, which only "
                "source.kind: stream makes"
            )
        if self.ss > 0 and batch < 2:
            raise ValueError(f"batch is {batch}; objective.ss > 0 relates images to each other: allowed: 2 or more")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> SSKDSpec:
        if not any((self.kl, self.tf, self.ss)):
            raise ValueError("all weights are 0; give at least one of kl, tf, ss a positive weight")
        return self


def _kind_of(given: Any) -> Any:
    """What `kind` says, also where it is left out (then it is the plain distillation) or the section is no mapping."""
    if isinstance(given, Spec):
        return getattr(given, "kind", KIND)
    return str(given.get("kind", KIND)) if isinstance(given, dict) else KIND


AnyObjectiveSpec = Annotated[
    Annotated[ObjectiveSpec, Tag("distillation")]
    | Annotated[NoisySpec, Tag("noisy")]
    | Annotated[SSKDSpec, Tag("sskd")]
    | Annotated[KD3Spec, Tag("kd3")],
    Discriminator(_kind_of),
]
"""A student's objective, by its `kind`; an assistant's is always plain distillation."""
