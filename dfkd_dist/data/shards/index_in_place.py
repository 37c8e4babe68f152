"""A manifest for tars that stay where they are, on this machine or elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_dist.data.shards.files import expand, is_remote, local_copy
from dfkd_dist.data.shards.index import entry_of
from dfkd_dist.data.shards.input_tars import tars_identity
from dfkd_dist.data.shards.manifest import FORMAT, Manifest
from dfkd_dist.data.shards.run import run_jobs
from dfkd_dist.data.shards.workplace import INDEX, Workplace

log = logging.getLogger(__name__)


def index_in_place(
    where: str,
    folder: Path,
    classes: Sequence[str] | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write a manifest of the tars of a folder, a pattern or URLs; nothing is copied.

    Tars below `folder` are named relative to it, others by absolute path or URL. Labels are members `KEY.cls`:
    numbers, or names out of `classes`. An interrupted run goes on where it was. Raises DatasetError for a folder that
    has a manifest already (unless `overwrite`), and for tars that are compressed or broken.
    """
    locations = expand(where)
    names = None if classes is None else list(classes)
    recipe = {
        "format": FORMAT,
        "kind": INDEX,
        "input": {"tars": tars_identity(locations)},
        "options": {"classes": names},
    }
    place = Workplace(folder, may_hold_tars=True)
    jobs = _IndexJobs(locations, names, place)
    return run_jobs(place, recipe, jobs, names, workers=workers, overwrite=overwrite, progress=progress)


class _IndexJobs:
    """Job s describes tar s."""

    def __init__(self, locations: list[str], classes: list[str] | None, place: Workplace) -> None:
        self._locations, self._classes, self._place = locations, classes, place

    def __len__(self) -> int:
        return len(self._locations)

    def __call__(self, number: int) -> int:
        # Whether a tar changed since it was noted is told by the recipe, which holds sizes and times.
        note = self._place.noted(number)
        if note is None:
            entry = self._described(self._locations[number])
            self._place.note(number, entry if entry["count"] else None)
        else:
            entry = note["entry"] or {"count": 0}
        return int(entry["count"])

    def _described(self, location: str) -> dict[str, Any]:
        with local_copy(location) as path:
            entry = entry_of(path, self._name(location), self._classes, location)
        if not entry["count"]:
            log.warning("%s: holds no images (jpg, png, webp) and is left out", location)
        return entry

    def _name(self, location: str) -> str:
        if is_remote(location):
            return location
        path, folder = Path(location).resolve(), self._place.folder.resolve()
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
