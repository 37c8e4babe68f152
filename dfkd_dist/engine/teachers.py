"""From a recipe's teachers to sealed networks on the ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.config import PrecisionSpec, Recipe, RecipeError, TeacherSpec
from dfkd_dist.engine.seeding import seeded
from dfkd_dist.models.cards import Card, read_card
from dfkd_dist.models.network import parameter_count
from dfkd_dist.models.teacher import Teacher, class_order
from dfkd_dist.models.weights import WeightsError, load_weights

RANDOM = "random"
"""Instead of a weights file: a teacher with fresh weights, for dry runs and tests."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def teacher_cards(recipe: Recipe) -> list[Card]:
    """How to build every teacher: the recipe's keys over those of the JSON beside the weights.

    Raises:
        RecipeError: a teacher cannot be built from what is known, or teachers disagree about classes.
    """
    cards = [_card(recipe, i, spec) for i, spec in enumerate(recipe.teachers)]
    for spec, card in zip(recipe.teachers, cards, strict=True):
        if card.num_classes != recipe.num_classes:
            raise RecipeError(
                f"teacher {spec.name} has {card.num_classes} classes, but num_classes is {recipe.num_classes}"
            )
        if card.classes is not None and len(card.classes) != card.num_classes:
            raise RecipeError(f"teacher {spec.name}: {len(card.classes)} class names for {card.num_classes} classes")
    reference = reference_classes(cards)
    for spec, card in zip(recipe.teachers, cards, strict=True):
        class_order(card.classes, reference, spec.name)
    return cards


def reference_classes(cards: Sequence[Card]) -> list[str] | None:
    """The run's class order: that of the first teacher that names its classes."""
    return next((list(card.classes) for card in cards if card.classes is not None), None)


def _card(recipe: Recipe, index: int, spec: TeacherSpec) -> Card:
    found: dict[str, Any] = {} if spec.weights == RANDOM else read_card(spec.weights)
    given = {k: getattr(spec, k) for k in ("arch", "size", "channels", "mean", "std", "classes")}
    merged = found | {k: v for k, v in given.items() if v is not None}
    channels = merged.setdefault("channels", recipe.image.channels)
    merged.setdefault("size", recipe.image.size)
    merged.setdefault("num_classes", recipe.num_classes)
    if spec.weights == RANDOM:
        merged.setdefault("mean", [0.5] * channels)
        merged.setdefault("std", [0.25] * channels)
    missing = [k for k in ("arch", "mean", "std") if k not in merged]
    if missing and spec.weights != RANDOM and not Path(spec.weights).is_file():
        raise WeightsError(f"teachers.{index} ({spec.name}): {spec.weights}: no such file with weights")
    if missing:
        beside = Path(spec.weights).with_suffix(".json")
        raise RecipeError(
            f"teachers.{index} ({spec.name}): {', '.join(missing)} not given, neither here nor in {beside}"
        )
    try:
        return Card(**merged)
    except ValueError as error:
        raise RecipeError(f"teachers.{index} ({spec.name}): {error}") from error


def teacher_costs(cards: Sequence[Card]) -> list[float]:
    """Parameters of each teacher, counted without allocating them: what rows are packed by.

    Raises:
        RecipeError: there is no such network.
    """
    return [_cost(index, card) for index, card in enumerate(cards)]


def _cost(index: int, card: Card) -> float:
    try:
        with torch.device("meta"):
            return float(parameter_count(card.build()))
    except ValueError as error:
        raise RecipeError(f"teachers.{index}.arch: {error}") from error


def teacher_weights(recipe: Recipe) -> list[float]:
    """w_k of DFMF Eq. 1, summing to one; 1 / K where none is given.

    Raises:
        RecipeError: some teachers have a weight and some have none.
    """
    given = [spec.weight for spec in recipe.teachers]
    if all(w is None for w in given):
        return [1.0 / len(given)] * len(given) if given else []
    if any(w is None for w in given):
        bare = [spec.name for spec in recipe.teachers if spec.weight is None]
        raise RecipeError(f"teachers: give a weight to all or to none; without one: {', '.join(bare)}")
    total = sum(w for w in given if w is not None)
    return [w / total for w in given if w is not None]


def make_teacher(
    recipe: Recipe, index: int, cards: Sequence[Card], device: torch.device, precision: PrecisionSpec
) -> tuple[Teacher, Teacher]:
    """A sealed teacher (for the generator's step), and its copy that only answers.

    Raises:
        WeightsError: the file does not fit the network, or holds values that are not finite.
    """
    spec, card = recipe.teachers[index], cards[index]
    with seeded(recipe.seed, "teacher", spec.name):
        network = card.build()
    if spec.weights != RANDOM:
        try:
            load_weights(network, spec.weights)
        except WeightsError as error:
            raise WeightsError(f"teacher {spec.name}: {error}") from error
    order = class_order(card.classes, reference_classes(cards), spec.name)
    teacher = Teacher(network, card.preprocess(recipe.image.size), spec.name, card.classes, order)
    dtype = DTYPES[precision.teacher]
    teacher = teacher.double() if dtype == torch.float64 else teacher
    answering = teacher.answering(precision.fold_batch_norm)
    for one in (teacher, answering):
        if dtype == torch.bfloat16:
            one.cast(dtype)
        if precision.channels_last:
            one.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher.to(device), answering.to(device)
