"""DFMF's comparison (its Table 2) at a budget for this machine: teachers, ensemble, gold standard and every method.

    python -m benchmarks.dfmf_table --set mnist_ibl3 [--seeds 0 1 2] [--json FILE] [--quick]

Resumable: a run that is finished is kept, one that was cut off goes on from its checkpoint. Every method's student sees
the same number of images. Means and sample standard deviations (ddof = 1) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish
from dfkd_dist.config import Recipe, load_recipe, load_teachers_recipe
from dfkd_dist.engine.private_teachers import GOLD, train_teachers
from dfkd_dist.engine.report import SUMMARY
from dfkd_dist.engine.run import run
from dfkd_dist.engine.trackers import METRICS, read_metrics

METHODS = ("dfmf", "dfq", "dfq_noadv", "dafl", "zskt")
TEACHERS = {
    "mnist_ibl3": "teachers/mnist_ibl3_resnet8.yaml",
    "mnist_ibl20": "teachers/mnist_ibl20_resnet8.yaml",
    "cifar10_wrn_ibl3": "teachers/cifar10_wrn_ibl3_wrn16_1.yaml",
}
PAPER = {
    "gold": "94.92",
    "teachers": "90.43 / 89.79",
    "ensemble": "93.12",
    "zskt": "63.44 ± 16.36",
    "dafl": "89.76 ± 0.24",
    "dfq_noadv": "91.81 ± 0.09",
    "dfq": "88.12 ± 2.42",
    "dfmf": "92.27 ± 0.19",
}
"""Table 2, CIFAR-10, IBL (r = 3), ResNet-18: another scale of budget and network."""

CHANCE = 10.0
"""Percent, with ten classes."""


def main() -> None:
    """Train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(TEACHERS), default="mnist_ibl3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--adv", type=float, help="another weight of the adversary, for dfmf and dfq")
    parser.add_argument("--work", type=Path, default=Path("runs/table"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, a few rounds: shows that it works, no numbers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = given.seeds[:1] if given.quick else given.seeds
    work = given.work / ("quick" if given.quick else "full") / given.set
    found = [one_seed(given, seed, work / f"seed{seed}") for seed in seeds]
    rows = summarise(found, given.methods)
    dfmf = next((row["accuracy"] for row in rows if row["row"] == "dfmf"), float("nan"))
    headline = {"name": f"DFMF student on {given.set}", "value": dfmf, "unit": "%", "aim": None}
    name = f"dfmf_{given.set}" + ("" if given.adv is None else f"_adv{given.adv:g}")
    finish(name, given, rows, headline, seeds=seeds, adv=given.adv, runs=found)


def one_seed(given: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Teachers, gold standard and one run of every method for a seed."""
    quick = ["epochs=1", "dataset.limit=2000"] if given.quick else []
    changes = [f"seed={seed}", f"split.seed={seed}", f"out={work}/teachers", *quick]
    teachers = load_teachers_recipe(TEACHERS[given.set], changes)
    if teachers.gold is None:
        teachers = load_teachers_recipe(TEACHERS[given.set], [*changes, f"gold={teachers.archs[0]}"])
    made = train_teachers(teachers, resume=True)
    gold = next(one for one in made if one["name"] == GOLD)
    methods = {method: one_run(given, method, seed, work) for method in given.methods}
    return {"seed": seed, "gold": gold["accuracy"], "methods": methods}


def one_run(given: argparse.Namespace, method: str, seed: int, work: Path) -> dict[str, Any]:
    """The summary of one method, trained if need be, with its curves of disagreement."""
    recipe = method_recipe(given, method, seed, work)
    path = recipe.run_dir()
    if not (path / SUMMARY).is_file():
        code, _ = run(recipe, resume=True, device=given.device)
        if code != 0:
            sys.exit(f"{path}: stopped with exit code {code}; start again to go on")
    summary = json.loads((path / SUMMARY).read_text())
    kept = ("teachers", "ensemble", "highest_confidence", "student", "steps", "image_passes", "wall_seconds", "quality")
    trained_on = summary["steps"] * (recipe.batch // len(recipe.teachers)) * len(recipe.teachers)
    return {key: summary[key] for key in kept} | {"student_images": trained_on, "curves": curves(path / METRICS)}


def method_recipe(given: argparse.Namespace, method: str, seed: int, work: Path) -> Recipe:
    """The shipped recipe with this seed's teachers."""
    heavier = [] if given.adv is None else [f"source.loss.adv={given.adv}"]
    run_name = method if given.adv is None else f"{method}_adv{given.adv:g}"
    overrides = [f"seed={seed}", f"out={work}/{run_name}", *heavier]
    overrides += [f"teachers.{k}.weights={work}/teachers/t{k}.safetensors" for k in range(2)]
    if given.quick:
        overrides += ["rounds.warmup=4", "rounds.main=4", "evaluation.dataset.limit=500", "log.every=2"]
    return load_recipe(f"dfmf/{given.set}_{method}.yaml", overrides)


def curves(metrics: Path) -> dict[str, list[list[float]]]:
    """Rounds and values of D(T,S) and D(T,A), mean over the generators (the paper's Fig. 4)."""
    found: dict[str, list[list[float]]] = {}
    for line in read_metrics(metrics):
        for kind in ("D(T,S)", "D(T,A)"):
            values = [v for name, v in line.items() if name.endswith(kind) and v is not None]
            if values:
                found.setdefault(kind, []).append([line["round"], sum(values) / len(values)])
    return found


def summarise(found: list[dict[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    """Rows of the table: mean, sample standard deviation, and what the paper has."""
    any_method = [one["methods"][methods[0]] for one in found]
    rows = [_row("gold", [one["gold"] for one in found])]
    for k in range(2):
        rows.append(_row(f"teacher {k}", [one["teachers"][k]["accuracy"] for one in any_method]))
    rows.append(_row("ensemble", [one["ensemble"]["accuracy"] for one in any_method]))
    for method in methods:
        runs = [one["methods"][method] for one in found]
        row = _row(method, [one["student"]["accuracy"] for one in runs])
        row["student images"] = runs[0]["student_images"]
        row["seconds"] = statistics.mean(one["wall_seconds"] for one in runs)
        for kind in ("D(T,S)", "D(T,A)"):
            last = [one["curves"][kind][-1][1] for one in runs if one["curves"].get(kind)]
            row[f"{kind} at the end"] = statistics.mean(last) if last else None
        row["note"] = "budget too small" if row["accuracy"] < 2 * CHANCE else ""
        rows.append(row)
    for row in rows:
        row["paper"] = PAPER.get(row["row"], "")
    return rows


def _row(name: str, values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"row": name, "accuracy": statistics.mean(values), "std": spread, "seeds": len(values)}


if __name__ == "__main__":
    main()
