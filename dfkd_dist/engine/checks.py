"""What a recipe asks of its networks, checked on all ranks before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from dfkd_dist.config import (
    AnyObjectiveSpec,
    AnySynthesisSpec,
    CMISpec,
    GenerativeSpec,
    InversionSpec,
    LatentSpec,
    ObjectiveSpec,
    Recipe,
    RecipeError,
)
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.models.signals import MAP
from dfkd_dist.models.taps import Taps
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.group import Group

T = TypeVar("T")

NEEDS: dict[str, tuple[str, Callable[[Taps], bool]]] = {
    "bn": ("batch norm with stored statistics", lambda taps: bool(taps.batch_norms)),
    "act": ("linear classifier", lambda taps: taps.classifier is not None),
    "cr": ("batch norm with stored statistics", lambda taps: bool(taps.batch_norms)),
}
"""What a generator's term needs of a teacher, in words and as a question to its taps."""
ON_MAPS = ("vid", "at")
"""Terms of an objective that compare the last convolutions' maps."""


def agreed(world: Group, act: Callable[[], T]) -> T:
    """Do it on every rank; a failure on one is raised on all, so that none waits for a rank that gave up.

    Raises:
        ValueError: another rank failed (named); this rank's own error is raised as it is.
    """
    value: T | None = None
    own: Exception | None = None
    try:
        value = act()
    except Exception as error:  # it must reach the others, who are waiting
        own = error
    failures = world.gather_objects(None if own is None else f"{own}")
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise ValueError(f"rank {rank}: {failure}")
    return cast(T, value)


def check_generator_terms(recipe: Recipe, teacher: Teacher, arch: str) -> None:
    """Refuse terms of the loss of a generator, or of images, that this teacher cannot serve.

    Raises:
        RecipeError: names the term's key, its weight, the teacher and what the teacher lacks.
    """
    for key, weights in _rows_in_use(recipe).items():
        for term, (what, has) in NEEDS.items():
            if weights.get(term, 0.0) > 0 and not has(teacher.taps):
                raise RecipeError(
                    f"{key}.{term} is {weights[term]:g}, but teacher {teacher.name} ({arch}) has no {what}; "
                    f"set {key}.{term}: 0, or give a teacher that has it"
                )


def _rows_in_use(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Key of a row of weights to the weights, for those rows that the run will use."""
    source = recipe.source
    if isinstance(source, InversionSpec):
        return _rows_of_images(source.synthesis, recipe.rounds.warmup)
    if not isinstance(source, GenerativeSpec):
        return {}
    rows = {} if source.freeze_after_warmup else {"source.loss": source.loss.weights()}
    if recipe.rounds.warmup and source.warmup_loss is not None:
        rows["source.warmup_loss"] = source.warmup_loss.weights()
    elif recipe.rounds.warmup:
        rows.setdefault("source.loss", source.warmup_weights())
    return rows


def _rows_of_images(synthesis: AnySynthesisSpec, warmup: int) -> dict[str, dict[str, float]]:
    rows = {"source.synthesis.loss": synthesis.loss.weights()}
    if warmup and isinstance(synthesis, LatentSpec) and synthesis.warmup_loss is not None:
        rows["source.synthesis.warmup_loss"] = synthesis.warmup_loss.weights()
    if isinstance(synthesis, CMISpec) and synthesis.contrast.layers is not None:
        # Then it is not the batch norms whose inputs are compared.
        rows = {key: weights | {"cr": 0.0} for key, weights in rows.items()}
    return rows


def check_student_classes(recipe: Recipe, reference: Sequence[str] | None) -> None:
    """Refuse class names that would mislabel the exported student, whose logits are in the run's class order.

    Raises:
        RecipeError: another number of names than classes, or not the teachers' order.
    """
    given = recipe.student.classes
    if given is None:
        return
    if len(given) != recipe.num_classes:
        raise RecipeError(f"student.classes: found {len(given)} names, but num_classes is {recipe.num_classes}")
    if reference is not None and given != list(reference):
        raise RecipeError(f"student.classes: found {given}, but the teachers' order is {list(reference)}; leave it out")


def check_maps(key: str, objective: AnyObjectiveSpec, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Refuse terms on feature maps where a network has none.

    Args:
        key: of the objective in the recipe.
        objective: its weights.
        shapes: for each network taking part, as people know it, the shapes of its signals.

    Raises:
        RecipeError: names the term's key, its weight and the network.
    """
    bare = [name for name, known in shapes.items() if MAP not in known]
    for term in ON_MAPS:
        weight = objective.weights().get(term, 0.0)
        if weight > 0 and bare:
            raise RecipeError(
                f"{key}.{term} is {weight:g}, but {', '.join(bare)} has no convolution map to compare; "
                f"set {key}.{term}: 0"
            )


def check_labels(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse cross-entropy with labels on shards that have none, or others than the run's classes.

    Raises:
        RecipeError: names the key, and what the shards hold.
    """
    if not isinstance(recipe.objective, ObjectiveSpec) or recipe.objective.ce == 0:
        return
    labels_n = manifest.labels_N if manifest.held_N is None else manifest.labels_N[manifest.held_N]
    low, high = int(labels_n.min()), int(labels_n.max())
    if low < 0 or high >= recipe.num_classes:
        what = "samples without a label" if low < 0 else f"labels up to {high}"
        raise RecipeError(
            f"objective.ce is {recipe.objective.ce:g}, but {manifest.path} holds {what}; allowed: a label from 0 to "
            f"{recipe.num_classes - 1} for every sample (num_classes is {recipe.num_classes})"
        )
