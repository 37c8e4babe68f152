"""Checkpoints that are whole or not there: written aside, checksummed, renamed; readable on any number of ranks.

A checkpoint is a directory of parts. A part is keyed by what it is (`student`, `generator/t0`), never by a rank, so a
run can go on with other ranks than it stopped with. `manifest.json`, written last, lists every file with size and sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd_dist.parallel.group import Group

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and what was wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk.

    Args:
        path: its directory.
        about: position in the run and whatever else was saved beside the parts.
        files: part name to file name.
    """

    path: Path
    about: dict[str, Any]
    files: dict[str, str]

    def part(self, name: str) -> Any:
        """What was saved as `name`, on the CPU; never runs code from the file.

        Raises:
            CheckpointError: there is no such part.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path}: no part {name!r}; there are: {', '.join(sorted(self.files))}")
        return torch.load(self.path / self.files[name], map_location="cpu", weights_only=True)


def save(folder: Path, about: Mapping[str, Any], own: Mapping[str, Any], world: Group, keep: int) -> Path:
    """Write a checkpoint together; every rank of `world` calls it with the parts that it is to write.

    Args:
        folder: where checkpoints live; this one is named after `about["round"]` and `about["tick"]`.
        about: small facts (JSON); the same on every rank.
        own: this rank's parts. A part replicated over ranks is given by one of them only.
        world: all ranks.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: on every rank alike, if any of them could not write; earlier checkpoints are untouched.
    """
    name = f"round_{about['round']:08d}_{about['tick']:04d}"
    aside, final = folder / f".tmp_{name}", folder / name
    _together(world, "prepare", lambda: _prepare(aside) if world.rank == 0 else None)
    written = _together(world, "write", lambda: {part: _write_part(aside, part, state) for part, state in own.items()})
    files = {part: entry for of_rank in written for part, entry in of_rank.items()}
    _together(world, "publish", lambda: _publish(aside, final, about, files) if world.rank == 0 else None)
    if world.rank == 0:
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _together(world: Group, doing: str, act: Any) -> list[Any]:
    """Run `act` on each rank and share results; an error on one rank becomes the same error on all."""
    try:
        outcome: tuple[str | None, Any] = (None, act())
    except Exception as error:  # whatever happened here must reach the others, who are waiting
        outcome = (f"{type(error).__name__}: {error}", None)
    outcomes = world.gather_objects(outcome)
    errors = [f"rank {rank}: {message}" for rank, (message, _) in enumerate(outcomes) if message is not None]
    if errors:
        raise CheckpointError(f"could not {doing} the checkpoint ({'; '.join(errors)}); the one before is still good")
    return [value for _, value in outcomes]


def _prepare(aside: Path) -> None:
    # Left-overs of a killed run, half-written by definition.
    for stale in aside.parent.glob(".tmp_*"):
        shutil.rmtree(stale)
    aside.mkdir(parents=True)


def _write_part(aside: Path, part: str, state: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    file = part.replace("/", "--") + ".pt"
    _write_durably(aside / file, content)
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_durably(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _publish(aside: Path, final: Path, about: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    for entry in files.values():
        if not (aside / entry["file"]).is_file():
            raise OSError(f"{aside / entry['file']} is not visible on rank 0: the run directory must be shared by all nodes")
    manifest = json.dumps({"about": dict(about), "files": dict(files)}, indent=1, sort_keys=True)
    _write_durably(aside / MANIFEST, manifest.encode())
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _complete(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in folder.glob("round_*") if (path / MANIFEST).is_file())


def latest(folder: Path, world: Group) -> Checkpoint | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are passed over with a warning.

    Rank 0 verifies, and all ranks get its choice.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    chosen = _newest_whole(folder) if world.rank == 0 else None
    chosen = world.gather_objects(chosen)[0]
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    return chosen


def _newest_whole(folder: Path) -> Checkpoint | str | None:
    found = sorted(folder.glob("round_*"), reverse=True)
    refused = []
    for path in found:
        try:
            return read(path)
        except CheckpointError as error:
            refused.append(str(error))
            log.warning("checkpoint refused: %s", error)
    return f"no checkpoint in {folder} is whole: {'; '.join(refused)}" if refused else None


def read(path: Path) -> Checkpoint:
    """Open one checkpoint after checking size and sha256 of every file.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a file is missing, truncated or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        about, files = manifest["about"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is missing or damaged ({type(error).__name__})") from error
    for entry in files.values():
        _verify(path / entry["file"], entry)
    return Checkpoint(path, about, {part: entry["file"] for part, entry in files.items()})


def _verify(file: Path, entry: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{file} has {size} bytes, the manifest says {entry['bytes']}: truncated or altered")
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{file} does not have the sha256 of the manifest: altered")
