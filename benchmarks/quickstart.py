"""The quick start over its fixed seeds: is every teacher honest, and does the student beat them by enough?

    python -m benchmarks.quickstart [--quick] [--json FILE]

Runs the commands of `make quickstart` for seeds 0, 1 and 2. Headline: the smallest lead of the student over the better
teacher, in points.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, finish

BIN = Path(sys.executable).parent
LAUNCH = ["launch", "--config_file", "launch/accelerate/cpu.yaml", "--num_processes", "2", "launch/train.py"]


def one(seed: int, quick: bool) -> dict[str, Any]:
    """Both commands for a seed, and what came of them."""
    work = Path("runs/benchmark-quickstart")
    teachers, student = work / f"teachers{seed}", work / f"student{seed}"
    start = time.perf_counter()
    short = ["epochs=3"] if quick else []
    _run(
        "dfkd",
        "teachers",
        "train",
        "quickstart/teachers.yaml",
        f"seed={seed}",
        f"split.seed={seed}",
        f"out={teachers}",
        *short,
    )
    overrides = [f"seed={seed}", f"out={student}"]
    overrides += [f"teachers.{k}.weights={teachers}/t{k}.safetensors" for k in range(2)]
    short = ["rounds.warmup=10", "rounds.main=3"] if quick else []
    _run("accelerate", *LAUNCH, "configs/quickstart/dfmf.yaml", *overrides, *short)
    seconds = time.perf_counter() - start
    summary = json.loads((student / "summary.json").read_text())
    parties = json.loads((teachers / "teachers.json").read_text())
    best = max(entry["accuracy"] for entry in summary["teachers"])
    accuracy, ensemble = summary["student"]["accuracy"], summary["ensemble"]["accuracy"]
    return {
        "seed": seed,
        "teacher 0": summary["teachers"][0]["accuracy"],
        "teacher 1": summary["teachers"][1]["accuracy"],
        "frequent 0": parties[0]["frequent_accuracy"],
        "frequent 1": parties[1]["frequent_accuracy"],
        "ensemble": ensemble,
        "student": accuracy,
        "lead": accuracy - best,
        "gap": ensemble - accuracy,
        "seconds": seconds,
    }


def _run(program: str, *words: str) -> None:
    subprocess.run([str(BIN / program), *words, "--overwrite"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__ or "")
    rows = [one(seed, given.quick) for seed in ([0] if given.quick else [0, 1, 2])]
    value = min(row["lead"] for row in rows)
    headline = {"name": "smallest lead over the better teacher", "value": value, "unit": "points", "aim": 5.0}
    finish("quickstart", given, rows, headline)


if __name__ == "__main__":
    main()
