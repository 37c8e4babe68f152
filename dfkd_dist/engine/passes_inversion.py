"""How many images an inversion's networks see, counted from the algorithm."""

from __future__ import annotations

from collections.abc import Mapping

from dfkd_dist.config import InversionSpec, LatentSpec, Recipe
from dfkd_dist.engine.evaluate import STUDENT


def inversion_passes(recipe: Recipe, source: InversionSpec, rounds: int, taught: int) -> dict[str, int]:
    """As `report.image_passes`: a round is each teacher's synthesis, a harvest, and the assistants' steps.

    Args:
        recipe: teachers and batch.
        source: its section.
        rounds: rounds done.
        taught: images that the student learned from.
    """
    k, synthesis, warmup = len(recipe.teachers), source.synthesis, recipe.rounds.warmup
    each = k * source.per_round(recipe.batch)
    made = each * sum(synthesis.phases().values())
    rows = [synthesis.weights_in(round, warmup) for round in range(rounds)]
    contrasted = made * sum(weights.get("cr", 0.0) > 0 for weights in rows)  # by a second view
    played = made * sum(student_is_read(weights) for weights in rows)
    main = max(rounds - warmup, 0)
    mimicked = 0 if source.assistant is None else k * recipe.batch * source.assistant.steps * main
    asked = each * rounds if source.pool.targets == "stored" else taught
    passes = {"teacher": made * rounds + contrasted + mimicked + k * asked, STUDENT: taught}
    passes |= {STUDENT: taught + played} if source.assistant is None else {"assistant": mimicked + played}
    return passes | ({"generator": made * rounds} if isinstance(synthesis, LatentSpec) else {})


def student_is_read(weights: Mapping[str, float]) -> bool:
    """Whether images with these weights of their terms play against the student (or an assistant in its place)."""
    return any(weights.get(term, 0.0) > 0 for term in ("js", "adv"))
