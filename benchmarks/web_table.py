"""Real images instead of the original data: selections and objectives side by side, at a budget for this machine.

    python -m benchmarks.web_table --set kd3_mnist [--seeds 0 1 2] [--json FILE] [--quick]
    python -m benchmarks.web_table --set mosaic_mnist

`kd3_mnist`: KD3's MNIST row (LeNet5 to LeNet5-half), its ablations of the selection (its Table 2) and DFND, on images
of MNIST-M and photographs mixed, in grey (the paper's web images of SVHN are not at hand). `mosaic_mnist`: MosaicKD
against KD, Balanced and FitNet on photographs alone, and its patch sizes (its Table 4; first seed only). Every student
of a set makes the same number of steps. Resumable: a finished run is kept, one that was cut off goes on from its
checkpoint. Means and sample standard deviations (ddof = 1) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish
from dfkd_dist.cli import main as dfkd
from dfkd_dist.config import Recipe, load_recipe, load_teachers_recipe
from dfkd_dist.engine.private_teachers import GOLD, train_teachers
from dfkd_dist.engine.report import SUMMARY
from dfkd_dist.engine.run import run

CHANCE = 10.0
SHARDS = Path("runs/shards")


@dataclass(frozen=True)
class Row:
    """One student: a shipped recipe and what differs from it."""

    recipe: str
    overrides: list[str] = field(default_factory=list)
    paper: str = ""
    first_seed_only: bool = False


KD3, MOSAIC = "kd3/cpu_mnist_mnistm.yaml", "mosaickd/cpu_mnist_from_photos"
KL = "objective={kind: distillation, kl: 1.0, temperature: 4.0, kl_scale: tau2}"
STREAM = f"source={{kind: stream, reader: {{shards: {SHARDS}/photos28, workers: 1}}}}"


def _ood(objective: str, *more: str) -> Row:
    return Row(f"{MOSAIC}_paper.yaml", ["method=OOD", STREAM, objective, "augment={crop_padding: 2}", *more])


def _selected(mode: str, paper: str) -> Row:
    return Row(KD3, [f"source.selection.mode={mode}"], paper)


ROWS: dict[str, dict[str, Row]] = {
    "kd3_mnist": {
        "KD3": Row(KD3, paper="98.77"),
        "KD3, random selection": _selected("random", ""),
        "KD3, teacher alone selects": _selected("teacher", ""),
        "KD3, student alone selects": _selected("student", ""),
        "KD3, no contrast": Row(KD3, ["objective.mdcl=0"]),
        "KD3, own classifier, soft labels": Row(KD3, ["objective.classifier=soft"]),
        "DFND": Row(
            KD3,
            [
                "objective={kind: noisy, kl: 1.0, noisy: 1.0, temperature: 4.0, kl_scale: tau2}",
                "source.selection={kind: top, count: 8000}",
            ],
            "98.37",
        ),
        "KD on all of them": Row(KD3, [KL, "source.selection=null"]),
    },
    "mosaic_mnist": {
        "KD": _ood(KL),
        "Balanced": _ood(KL, "source.selection={kind: top, count: 5000, balanced: true}"),
        "FitNet": _ood(KL.replace("kl: 1.0", "kl: 1.0, hint: 1.0")),
        "MosaicKD, synthetic alone": Row(f"{MOSAIC}_paper.yaml"),
        "MosaicKD, with photographs": Row(f"{MOSAIC}_released.yaml"),
    }
    | {
        f"MosaicKD, L = {field}": Row(
            f"{MOSAIC}_paper.yaml", [f"source.discriminator.field={field}"], first_seed_only=True
        )
        for field in (1, 2, 4, 18, 22)
    },
}
COMMON = {
    "kd3_mnist": [
        f"source.reader.shards={SHARDS}/web",
        "source.reader.fraction=0.5",
        "rounds.main=12",
        "rounds.student_steps=60",
        "evaluation.every=4",
    ],
    "mosaic_mnist": [f"source.reader.shards={SHARDS}/photos28", "rounds.main=300", "rounds.student_steps=5"],
}
"""The same number of steps for every row of a set."""


def main() -> None:
    """Build the shards, train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(ROWS), default="kd3_mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--work", type=Path, default=Path("runs/table"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: shows that it works, no numbers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    build_shards()
    rows = {name: row for name, row in ROWS[given.set].items() if given.rows is None or name in given.rows}
    seeds = given.seeds[:1] if given.quick else given.seeds
    work = given.work / ("quick" if given.quick else "full") / given.set
    found = {name: [] for name in rows}  # type: dict[str, list[dict[str, Any]]]
    gold: list[float] = []
    for seed in seeds:
        gold.append(teacher(given, seed, work))
        for name, row in rows.items():
            if seed == seeds[0] or not row.first_seed_only:
                found[name].append(one_run(given, name, row, seed, work))
    table = summarise(rows, found, gold)
    first = next(iter(rows))
    headline = {"name": f"{first} on {given.set}", "value": table[2]["accuracy"], "unit": "%", "aim": None}
    finish(f"web_{given.set}", given, table, headline, seeds=seeds, runs=found)


def build_shards() -> None:
    """Shards of MNIST-M, of photographs at 28 px, and of both mixed; kept where they are whole already."""
    steps = [
        ["data/mnistm_small.npz", f"{SHARDS}/mnistm", "--unlabelled"],
        ["data/photos_ood_jpg.npz", f"{SHARDS}/photos28", "--limit", "20000", "--size", "28"],
    ]
    both = SHARDS / "both"
    for step in steps:
        if not (Path(step[1]) / "manifest.json").exists():
            dfkd(["shards", "build", *step])
    if not (SHARDS / "web" / "manifest.json").exists():
        both.mkdir(exist_ok=True)
        for tar in [*(SHARDS / "mnistm").glob("*.tar"), *(SHARDS / "photos28").glob("*.tar")]:
            link = both / f"{tar.parent.name}-{tar.name}"
            link.unlink(missing_ok=True)
            link.symlink_to(tar.resolve())
        target = ["--kind", "tar", "--unlabelled", "--shuffle", "0"]
        dfkd(["shards", "build", str(both), str(SHARDS / "web"), *target])


def teacher(given: argparse.Namespace, seed: int, work: Path) -> float:
    """Train this seed's LeNet5, and LeNet5-half on the same original images; the latter's accuracy."""
    changes = [f"seed={seed}", f"out={work}/seed{seed}/teachers", "gold=lenet5_half"]
    changes += ["epochs=1", "dataset.limit=2000"] if given.quick else []
    made = train_teachers(load_teachers_recipe("teachers/mnist_single_lenet5.yaml", changes), resume=True)
    return float(next(one for one in made if one["name"] == GOLD)["accuracy"])


def one_run(given: argparse.Namespace, name: str, row: Row, seed: int, work: Path) -> dict[str, Any]:
    """The summary of one row, trained if need be."""
    recipe = row_recipe(given, name, row, seed, work)
    path = recipe.run_dir()
    if not (path / SUMMARY).is_file():
        code, _ = run(recipe, resume=True, device=given.device)
        if code != 0:
            sys.exit(f"{path}: stopped with exit code {code}; start again to go on")
    summary = json.loads((path / SUMMARY).read_text())
    kept = ("teachers", "student", "steps", "image_passes", "wall_seconds")
    return {"row": name, "seed": seed} | {key: summary[key] for key in kept}


def row_recipe(given: argparse.Namespace, name: str, row: Row, seed: int, work: Path) -> Recipe:
    """The shipped recipe with this seed's teacher and the set's budget."""
    folder = "".join(c if c.isalnum() else "_" for c in name)
    overrides = [*row.overrides, *COMMON[given.set], f"seed={seed}", f"out={work}/seed{seed}/{folder}"]
    overrides += [f"teachers.0.weights={work}/seed{seed}/teachers/t0.safetensors"]
    if given.quick:
        overrides += ["rounds.main=2", "rounds.student_steps=2", "evaluation.dataset.limit=500"]
        overrides += ["source.reader.fraction=0.1", "batch=16"]
        kd3 = row.recipe == KD3 and not any(o.startswith("source.selection=") for o in row.overrides)
        overrides += ["source.selection.threshold=0.01"] if kd3 else []
        overrides += ["source.selection.count=600"] if any("count:" in o for o in row.overrides) else []
    return load_recipe(row.recipe, overrides)


def summarise(rows: dict[str, Row], found: dict[str, list[dict[str, Any]]], gold: list[float]) -> list[dict[str, Any]]:
    """Rows of the table: mean, sample standard deviation, cost, and what the paper has."""
    any_row = next(iter(found.values()))
    table = [
        _row("teacher, LeNet5", [one["teachers"][0]["accuracy"] for one in any_row]),
        _row("student on the original images", gold),
    ]
    for name, runs in found.items():
        row = _row(name, [one["student"]["accuracy"] for one in runs])
        row["steps"] = runs[0]["steps"]
        row["seconds"] = statistics.mean(one["wall_seconds"] for one in runs)
        row["note"] = "budget too small" if row["accuracy"] < 2 * CHANCE else ""
        row["paper"] = rows[name].paper
        table.append(row)
    return table


def _row(name: str, values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"row": name, "accuracy": statistics.mean(values), "std": spread, "seeds": len(values)}


if __name__ == "__main__":
    main()
