"""Results of measures: kept in `evaluation.json` beside their pictures, and told in a few lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfkd_dist.engine.look.balance import SHOWN
from dfkd_dist.engine.report import finite

RESULTS = "evaluation.json"


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Put results over those of earlier calls in `evaluation.json`, whole or not at all; returns its path.

    Raises:
        ValueError: the file that is there is not what was written by this function.
    """
    path = folder / RESULTS
    before: Any = {}
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); remove it, or give another --out") from error
        if not isinstance(before, dict):
            raise ValueError(f"{path}: expected keys and values, found a {type(before).__name__}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{RESULTS}.{os.getpid()}.tmp")
    try:
        text = json.dumps(finite({**before, **results}), indent=1, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as text: a few aligned lines for each measure."""
    if "fid" in results:
        yield from _fid_lines(results["fid"])
    if "patch_fid" in results:
        one = results["patch_fid"]
        yield f"patch FID of {one['pool']} against {one['real']}, features of {one['features_of']}"
        yield from (f"  L = {size['size']:4d}  {_number(size)}" for size in one["sizes"])
    if "balance" in results:
        one = results["balance"]
        yield f"class balance of {one['pool']} ({one['images']} images) as {one['judge']} sees it"
        yield f"  evenness {one['evenness']:.3f}, {one['missing_classes']} of {len(one['classes'])} classes missing"
        yield from _ranking(one["classes"])
    for name in ("balance", "sheet", "tsne", "clusters"):
        if name in results:
            yield f"{name}: {results[name]['picture']}"


def _fid_lines(one: Mapping[str, Any]) -> Iterator[str]:
    yield f"FID of {one['pool']} against {one['real']}, features of {one['features_of']}: {_number(one)}"
    if "by_class" in one:
        mean = one["by_class"]["mean"]
        yield f"  by class, mean {mean:.3f}" if mean is not None else "  by class: too few images"
        yield from (f"  {entry['class']:24s} {_number(entry)}" for entry in one["by_class"]["classes"])


def _number(one: Mapping[str, Any]) -> str:
    """`12.345 (500 and 600 images)`, marked where a covariance was singular."""
    images = f"({one['real_images']} and {one['pool_images']} images)"
    if one["fid"] is None:
        return f"{'-':>10} {images}"
    mark = "" if one["full_rank"] else f", fewer than features + 1 = {one['features'] + 1}: biased upwards"
    return f"{one['fid']:10.3f} {images}{mark}"


def _ranking(classes: list[Mapping[str, Any]]) -> Iterator[str]:
    """Every class, or the first and last ten of many."""
    half = SHOWN // 2
    for rank, entry in enumerate(classes, start=1):
        if len(classes) <= SHOWN or rank <= half or rank > len(classes) - half:
            yield f"  {rank:5d}  {entry['class']:24s} {entry['images']:8d}  {entry['percent']:6.2f} %"
        elif rank == half + 1:
            yield "    ..."
