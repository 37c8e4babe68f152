"""Measures of a run that is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_dist.data.datasets import Split
from dfkd_dist.engine.finished import accuracies, dataset_of, open_finished
from dfkd_dist.engine.look.measures import Measuring, Wanted
from dfkd_dist.engine.look.named import Finder
from dfkd_dist.engine.look.results import write_results
from dfkd_dist.parallel.launch import LaunchError, launch_facts

FOLDER = "evaluation"
"""In the run's directory: results and pictures."""


def measure_run(
    run: Path,
    wanted: Wanted,
    *,
    data: Sequence[str] = (),
    split: Split = "test",
    device: str = "cpu",
    out: Path | None = None,
    accuracy: bool = False,
) -> dict[str, Any]:
    """Take measures of a run in this process; writes `evaluation.json` and pictures, and returns what was measured.

    Args:
        run: the run directory.
        wanted: which measures, of which images, by which networks.
        data: `key=value` over the run's evaluation set, or a whole set where the run has none; what `data` means.
        split: of labelled sets.
        device: `auto`, `cpu` or `cuda`.
        out: a folder; None: `RUN/evaluation`. Earlier results stay in its `evaluation.json` unless taken again.
        accuracy: also accuracies in percent, as `dfkd evaluate RUN` gives them.

    Raises:
        ValueError: the run, a file, a word or a class is not what it must be.
        ImportError: an extra is not installed.
        LaunchError: it was started on several ranks.
    """
    ranks = launch_facts().world_size
    if ranks > 1:
        raise LaunchError(f"measures are taken by one process, but {ranks} were started; start `dfkd evaluate` once")
    built = open_finished(run, device)
    folder = out or run / FOLDER
    finder = Finder(built, dataset_of(built, data), split, wanted.images, wanted.seed)
    found: dict[str, Any] = {}
    if accuracy:
        found["accuracy"] = dict(accuracies(built, run, data, split))
    found |= Measuring(built, wanted, finder, folder).results()
    write_results(folder, found)
    return found
