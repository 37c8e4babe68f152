"""A copy of a set of shards without what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import local_copy
from dfkd_dist.data.shards.manifest import FORMAT, Manifest, read_manifest
from dfkd_dist.data.shards.run import run_jobs
from dfkd_dist.data.shards.tar import write_shard
from dfkd_dist.data.shards.verify import Report, judge
from dfkd_dist.data.shards.workplace import Workplace


def write_clean(
    where: str | Path, report: Report, folder: Path, *, decode: bool = True, workers: int = 1, progress: bool = False
) -> Manifest:
    """Copy the set that `report` is about into `folder`, with a right manifest.

    Shards without findings are copied byte for byte; of the others, what is still good is written anew (images that
    are whole and unchanged, with the keys and labels that the tar itself holds, or the manifest's where the tar's
    structure is broken). `skipped.jsonl` lists what was left out and why. An interrupted copy goes on where it was.
    Raises DatasetError where nothing good is left, or if the folder holds something else.
    """
    manifest = read_manifest(where)
    if folder.resolve() == Path(manifest.path).parent.resolve():
        raise DatasetError(f"{folder}: holds the shards that are to be copied; choose another folder")
    faulty = {finding.shard for finding in report.findings}
    recipe = {
        "format": FORMAT,
        "kind": "clean",
        "input": {"sha256": manifest.digest},
        "findings": [asdict(finding) for finding in report.findings],
    }
    classes = None if manifest.classes is None else list(manifest.classes)
    place = Workplace(folder)
    jobs = _CleanJobs(manifest, faulty, place, decode)
    return run_jobs(place, recipe, jobs, classes, workers=workers, overwrite=False, progress=progress)


class _CleanJobs:
    """Job s copies shard s, or what is good of it."""

    def __init__(self, manifest: Manifest, faulty: Collection[str], place: Workplace, decode: bool) -> None:
        self._manifest, self._faulty, self._place, self._decode = manifest, faulty, place, decode
        self._entries = list(manifest.entries())

    def __len__(self) -> int:
        return len(self._entries)

    def __call__(self, number: int) -> int:
        note = self._place.noted(number)
        if note is not None and self._place.is_whole(note, number):
            entry = note["entry"]
        elif self._entries[number]["name"] in self._faulty:
            entry = self._sorted_out(number)
        else:
            entry = self._copied(number)
        return 0 if entry is None else int(entry["count"])

    def _copied(self, number: int) -> dict[str, Any]:
        target = self._place.shard_path(number)
        aside = target.with_name(f".{target.name}.{os.getpid()}.part")
        with local_copy(self._manifest.location(number)) as path:
            shutil.copyfile(path, aside)
        aside.replace(target)
        entry = {**self._entries[number], "name": target.name}
        self._place.note(number, entry)
        return entry

    def _sorted_out(self, number: int) -> dict[str, Any] | None:
        judged = judge(self._manifest, self._entries[number], decode=self._decode, keep=True)
        entry = write_shard(self._place.shard_path(number), judged.good) if judged.good else None
        left_out = [
            {"key": finding.key or "", "where": finding.shard, "reason": f"{finding.cause}: {finding.detail}"}
            for finding in judged.findings
            if finding.key is not None or finding.cause == "missing"
        ]
        self._place.note(number, entry, left_out)
        return entry
