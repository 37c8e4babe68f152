"""What every benchmark shares: `--quick`, `--json FILE`, facts about the machine, a table at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dfkd_dist.engine.rundir import versions


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`--quick` (under a minute) and `--json FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args(argv)


def machine(device: str) -> dict[str, Any]:
    """The hardware that a number belongs to."""
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def interleaved(acts: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each act, taken in turn, so that a slower minute of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for repeat in range(warmup + repeats):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def finish(
    name: str, given: argparse.Namespace, rows: list[dict[str, Any]], headline: dict[str, Any], **more: Any
) -> None:
    """Print the table and, if asked, write the JSON."""
    result = {
        "benchmark": name,
        "quick": given.quick,
        "machine": machine(given.device),
        "versions": versions(),
        "rows": rows,
        "headline": headline,
        **more,
    }
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    aim = "" if headline.get("aim") is None else f" (aim: {headline['aim']} {headline['unit']})"
    print(f"{headline['name']}: {headline['value']:.3g} {headline['unit']}{aim}")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal or different keys as aligned text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[_shown(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
