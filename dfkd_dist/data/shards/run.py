"""What building and indexing share: jobs of one shard each, over several processes, resumed where they stood."""

from __future__ import annotations

import json
import logging
from typing import Any, Protocol

from tqdm import tqdm

from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.shards.workers import spread
from dfkd_dist.data.shards.workplace import Workplace

log = logging.getLogger(__name__)


class Jobs(Protocol):
    """One job for each shard."""

    def __len__(self) -> int:
        """Number of jobs."""

    def __call__(self, number: int) -> int:
        """Finish shard `number`, unless it is finished, and note it; returns how many images it holds."""


def run_jobs(
    place: Workplace,
    recipe: dict[str, Any],
    jobs: Jobs,
    classes: list[str] | None,
    *,
    workers: int,
    overwrite: bool,
    progress: bool,
) -> Manifest:
    """Run the jobs that are left and write the manifest; DatasetError if the folder belongs to another recipe."""
    recipe = json.loads(json.dumps(recipe))
    # Refuses before anything is touched; asked again below, when nobody else can be at work.
    if overwrite:
        place.begun()
    elif place.is_finished(recipe):
        log.info("%s: is already complete", place.folder)
        return read_manifest(place.folder)
    with place.held():
        if overwrite:
            place.clear()
        if overwrite or not place.is_finished(recipe):
            place.begin(recipe)
            _run(jobs, workers, progress=progress)
            place.finish(len(jobs), classes)
        place.leave()
    return read_manifest(place.folder)


def _run(jobs: Jobs, workers: int, *, progress: bool) -> None:
    # None: a bar on a terminal only.
    with tqdm(total=len(jobs), unit="shard", disable=None if progress else True) as bar:
        images = 0
        for stored in spread(jobs, range(len(jobs)), min(workers, len(jobs))):
            images += stored
            bar.set_postfix_str(f"{images:,} images", refresh=False)
            bar.update()
