"""Segmentation is a task of the same system: networks that classify pixels, and what they cannot be used for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dfkd_dist.config import (
    AnyObjectiveSpec,
    GenerativeSpec,
    InversionSpec,
    LabelledSpec,
    MosaicSpec,
    ObjectiveSpec,
    Recipe,
    RecipeError,
    StreamSpec,
)
from dfkd_dist.losses.distillation import IGNORE
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.exchange import Shapes

OF_WHOLE_IMAGES = ("rkd_d", "rkd_a", "crd")
"""Terms of an objective that relate images to each other, by one vector of features each."""
UNSCORED = ("manifest", "random")
"""Selections that ask no network about an image."""


def is_dense(shapes: Shapes) -> bool:
    """Whether a network with signals of these shapes (without N) classifies pixels."""
    return len(shapes[LOGITS]) == 3


def check_task(recipe: Recipe, name: str, own: Shapes, teachers: Sequence[Shapes]) -> None:
    """Refuse networks of two tasks in one run, and what is defined for images as wholes where pixels are classified.

    Args:
        recipe: what is to run.
        name: of the network that learns.
        own: shapes of its signals.
        teachers: shapes of the signals of those that it learns from.

    Raises:
        RecipeError: names the key, what was found and what is allowed.
    """
    dense = is_dense(own)
    for shapes in teachers:
        if is_dense(shapes) != dense:
            said = "pixels, but a teacher of it images" if dense else "images, but a teacher of it pixels"
            raise RecipeError(f"{name} classifies {said}; allowed: networks of one kind")
    source = recipe.source
    if isinstance(source, LabelledSpec) and source.dataset.of_pixels != dense:
        given, wanted = ("pixels", "images") if source.dataset.of_pixels else ("images", "pixels")
        raise RecipeError(
            f"source.dataset.kind is {source.dataset.kind}, whose {given} have labels, but {name} classifies {wanted}"
        )
    if dense:
        for problem in _problems(recipe):
            raise RecipeError(f"{problem} (the networks classify pixels)")


def _problems(recipe: Recipe) -> Iterator[str]:
    if recipe.num_classes > IGNORE:
        yield f"num_classes is {recipe.num_classes}; allowed in maps of labels: up to {IGNORE}"
    if recipe.student.size not in (None, recipe.image.size):
        yield f"student.size is {recipe.student.size}; allowed: image.size ({recipe.image.size})"
    if recipe.compensation is not None:
        yield "compensation de-confounds one prediction for an image; allowed: none"
    yield from _of_objective("objective", recipe.objective)
    source = recipe.source
    if isinstance(source, GenerativeSpec) and source.assistant is not None:
        yield from _of_objective("source.assistant.objective", source.assistant.objective)
    if isinstance(source, InversionSpec):
        yield "source.kind is inversion, whose images have one label each; allowed: another source"
    selection = source.selection if isinstance(source, StreamSpec | MosaicSpec) else None
    if selection is not None and selection.kind not in UNSCORED:
        yield f"source.selection.kind is {selection.kind}, which scores whole images; allowed: {', '.join(UNSCORED)}"
    if isinstance(source, StreamSpec) and isinstance(recipe.objective, ObjectiveSpec) and recipe.objective.ce > 0:
        yield "objective.ce needs a label for each pixel, and shards have one for each image; set objective.ce: 0"


def _of_objective(key: str, objective: AnyObjectiveSpec) -> Iterator[str]:
    if not isinstance(objective, ObjectiveSpec):
        yield f"{key}.kind is {objective.kind}, which compares whole images; allowed: distillation"
        return
    for term in OF_WHOLE_IMAGES:
        weight = objective.weights().get(term, 0.0)
        if weight > 0:
            yield f"{key}.{term} is {weight:g}, which relates whole images to each other; set {key}.{term}: 0"
