"""What a run came to: `summary.json` for tools, and a table for people."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.config import AnyObjectiveSpec, GenerativeSpec, InversionSpec, KD3Spec, MosaicSpec, Recipe
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.evaluate import AVG_PRED, HIGHEST_CONF, STUDENT, Evaluation, best_teacher
from dfkd_dist.engine.flops import network_costs
from dfkd_dist.engine.passes_inversion import inversion_passes
from dfkd_dist.engine.quality import Quality
from dfkd_dist.losses.patch import discriminator_weight

SUMMARY = "summary.json"


def summarise(
    build: Build,
    evaluation: Evaluation | None,
    quality: Mapping[str, Quality],
    *,
    wall_seconds: float,
    steps: int | None = None,
    validation: Evaluation | None = None,
) -> dict[str, Any]:
    """Everything worth keeping about a run, as plain values. All ranks call it alike.

    Args:
        build: the run, trained.
        evaluation: on test images, or None where there are none (accuracies are null then).
        quality: the data-free measures.
        wall_seconds: time of the run, earlier parts included.
        steps: the student's steps; None asks the student's player.
        validation: on validation images, to choose the best teacher by.
    """
    recipe, trainer = build.recipe, build.trainer
    summary: dict[str, Any] = {
        "name": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "world_size": build.mesh.world.size,
        "rounds": trainer.position.round,
        "steps": trainer.student.steps if steps is None else steps,
        "wall_seconds": wall_seconds,
    }
    summary |= accuracies([spec.name for spec in recipe.teachers], evaluation)
    if evaluation is not None and evaluation.teachers and validation is not None:
        summary["best_teacher"] = asdict(best_teacher(validation, evaluation))
    for entry, card in zip([*summary["teachers"], summary["student"]], [*build.cards, build.student_card], strict=True):
        entry["arch"] = card.arch
    return summary | {
        "quality": {name: found.as_dict() for name, found in quality.items()},
        "losses": formulas(recipe),
        "networks": {name: asdict(cost) for name, cost in network_costs(build).items()},
        "image_passes": image_passes(
            recipe, trainer.source.update_steps, trainer.position.round, trainer.student.steps
        ),
        "throughput": trainer.meters.throughput(),
        "phase_seconds": dict(trainer.meters.seconds),
        "peak_memory_bytes": build.mesh.world.gather_objects(peak_memory_bytes(build.device)),
    }


def accuracies(teachers: Sequence[str], evaluation: Evaluation | None) -> dict[str, Any]:
    """The part of a summary that an evaluation fills; null where there is none.

    Args:
        teachers: names in recipe order.
        evaluation: on test images.
    """
    found = evaluation or Evaluation("", 0, math.nan)
    frequent = found.frequent

    def entry(voter: str, accuracy: float | None) -> dict[str, Any]:
        own: dict[str, Any] = {"accuracy": None if evaluation is None else accuracy}
        if voter in found.overlaps:
            own |= asdict(found.overlaps[voter])
        return own | ({"frequent": frequent[voter]} if voter in frequent else {})

    return {
        "evaluation": None if evaluation is None else {"split": found.split, "samples": found.samples},
        "teachers": [{"name": n} | entry(f"teacher/{n}", found.teachers.get(n)) for n in teachers],
        "ensemble": entry(AVG_PRED, found.ensembles.get(AVG_PRED)),
        "highest_confidence": entry(HIGHEST_CONF, found.ensembles.get(HIGHEST_CONF)),
        "best_teacher": None,
        "student": entry(STUDENT, found.student)
        | ({} if found.compensated is None else {"compensated_accuracy": found.compensated}),
    }


def formulas(recipe: Recipe) -> dict[str, str]:
    """What each kind of network minimises, as a weighted sum of named terms."""
    found = {"student": _objective(recipe.objective)}
    source = recipe.source
    if isinstance(source, GenerativeSpec):
        found["generator"] = _sum(source.loss.weights())
        if recipe.rounds.warmup:
            found["generator (warm-up)"] = _sum(source.warmup_weights())
        if source.assistant is not None:
            found["assistant"] = _objective(source.assistant.objective)
    if isinstance(source, InversionSpec):
        found["images"] = _sum(source.synthesis.loss.weights())
        if recipe.rounds.warmup:
            found["images (warm-up)"] = _sum(source.synthesis.weights_in(0, recipe.rounds.warmup))
        if source.assistant is not None:
            found["assistant"] = _objective(source.assistant.objective)
    if isinstance(source, MosaicSpec) and source.discriminator is not None:
        weight = discriminator_weight(source.discriminator.reduction)
        found["discriminator"] = _sum({"real": weight, "fake": weight})
    return found


def _objective(spec: AnyObjectiveSpec) -> str:
    tempered = not isinstance(spec, KD3Spec) and spec.kl > 0
    return _sum(spec.weights()) + (f" at temperature {spec.temperature:g}" if tempered else "")


def _sum(weights: Mapping[str, float]) -> str:
    return " + ".join(f"{weight:g}*{name}" for name, weight in weights.items() if weight > 0) or "0"


def image_passes(
    recipe: Recipe, update_steps: Callable[[int], int], rounds: int, student_steps: int, views: int = 1
) -> dict[str, int]:
    """Images that went forward through each kind of network in training, all of a kind and all ranks together.

    Counted from the algorithm, so it is the same at any world size; what is only reported or evaluated is left out.

    Args:
        recipe: batch sizes and steps.
        update_steps: inner steps of the source in a round.
        rounds: rounds done.
        student_steps: student steps done.
        views: versions of each image that the objective compares.
    """
    source, k = recipe.source, len(recipe.teachers)
    if isinstance(source, InversionSpec):
        return inversion_passes(recipe, source, rounds, student_steps * recipe.batch * views)
    if not isinstance(source, GenerativeSpec):
        taught = student_steps * recipe.batch * views
        return {STUDENT: taught} | ({"teacher": k * taught} if k else {})
    inner, each = [update_steps(round) for round in range(rounds)], k * recipe.batch
    made = each * sum(steps > 0 for steps in inner)
    main = sum(steps > 0 for steps in inner[recipe.rounds.warmup :])
    mimicked = 0 if source.assistant is None else each * source.assistant.steps * main
    judged, scored = _judged(source, inner, recipe.rounds.warmup)
    shown = student_steps * k * (recipe.batch // k)
    taught = shown + (student_steps * source.ood_batch if isinstance(source, MosaicSpec) else 0)
    adv = {True: source.warmup_weights()["adv"], False: source.loss.adv}
    fought = sum(steps > 0 and adv[round < recipe.rounds.warmup] > 0 for round, steps in enumerate(inner))
    read = each * fought
    passes = {
        "generator": made + each * judged + mimicked + (shown if source.student_images == "fresh" else 0),
        "teacher": made + mimicked + k * taught,
        STUDENT: taught + (read if source.adversary.against == "student" else 0),
    }
    if source.assistant is not None:
        passes["assistant"] = mimicked + (read if source.adversary.against == "assistant" else 0)
    if isinstance(source, MosaicSpec) and source.discriminator is not None:
        passes["discriminator"] = each * (2 * judged + scored)  # made and real ones, then the generator's
    return passes


def _judged(source: GenerativeSpec, inner: Sequence[int], warmup: int) -> tuple[int, int]:
    """Steps of a discriminator, and of a generator against it."""
    if not isinstance(source, MosaicSpec) or source.discriminator is None:
        return 0, 0
    patch = {True: source.warmup_weights()["patch"], False: source.loss.patch}
    rounds = [round for round, steps in enumerate(inner) if steps > 0]
    return len(rounds), sum(patch[round < warmup] > 0 for round in rounds)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held: the CUDA allocator's, or on a CPU the whole process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Write `summary.json` into the run's directory, whole or not at all; returns its path."""
    path = folder / SUMMARY
    aside = path.with_name(f".{SUMMARY}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(finite(summary), file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def finite(value: Any) -> Any:
    """The same nested values with NaN and infinities as None: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary in a few aligned lines: every teacher, the ensembles, the student, and what it took."""
    measures = {"accuracy": "accuracy"} | ({"miou": "mIoU"} if "miou" in summary["student"] else {})
    rows = [("", "network", "parameters", *measures.values())]
    networks = summary.get("networks", {})

    def add(title: str, names: tuple[str, str], entry: Mapping[str, Any]) -> None:
        rows.append((title, *names, *(_percent(entry, measure) for measure in measures)))

    for teacher in summary["teachers"]:
        add(f"teacher {teacher['name']}", _network(teacher, networks.get(f"teacher/{teacher['name']}")), teacher)
    if summary["teachers"]:
        add("ensemble (mean of probabilities)", ("", ""), summary["ensemble"])
        if "highest_confidence" in summary:
            add("ensemble (most confident)", ("", ""), summary["highest_confidence"])
    add("student", _network(summary["student"], networks.get(STUDENT)), summary["student"])
    return "\n".join([*_aligned(rows), *_closing(summary)])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<" + ">" * (len(widths) - 2)
    return ["  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def _network(entry: Mapping[str, Any], cost: Mapping[str, Any] | None) -> tuple[str, str]:
    return entry.get("arch", ""), f"{cost['parameters']:,}" if cost else ""


def _percent(entry: Mapping[str, Any], measure: str) -> str:
    value = entry.get(measure)
    return "-" if value is None else f"{value:.2f} %"


def _closing(summary: Mapping[str, Any]) -> list[str]:
    """Agreement, and what the run took."""
    lines = []
    for name, quality in summary.get("quality", {}).items():
        overall = quality["overall"]
        if overall["images"]:
            agreement, divergence = overall["agreement"], overall["kl"]
            whose = "the pixels of " if quality.get("of_pixels") else ""
            lines.append(
                f"student agrees with the ensemble on {agreement:.2f} % of {whose}{overall['images']:,} {name} images "
                f"(KL {divergence:.4f})"
            )
    ranks = summary["world_size"]
    time = duration(summary["wall_seconds"])
    lines.append(f"{summary['steps']:,} student steps in {time} on {ranks} rank{'s' if ranks > 1 else ''}")
    return lines


def duration(seconds: float) -> str:
    """`8.4 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
