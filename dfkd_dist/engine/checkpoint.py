"""Checkpoints that are whole or not there: written aside, checksummed, renamed; readable on any number of ranks.

A checkpoint is a directory of parts. A part is keyed by what it is (`student`, `generator/t0`), never by a rank, so a
run can go on with other ranks than it stopped with. `manifest.json`, written last, lists every file with size and
sha256, and carries its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dfkd_dist.parallel.group import Group

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
T = TypeVar("T")


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
            CheckpointError: there is no such part, or it holds more than tensors and plain values.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.path}: no part {name!r}; there are: {', '.join(sorted(self.files))}")
        file = self.path / self.files[name]
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's own message proposes to load it unsafely
            what = f"{type(error).__name__}; only tensors and plain values are loaded"
            raise CheckpointError(f"{file} was refused ({what})") from error


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
    first = world.rank == 0
    doing = "write the checkpoint (the one before is still good)"
    try:
        together(world, doing, lambda: _prepare(aside) if first else None)
        written = together(world, doing, lambda: {part: _write_part(aside, part, own[part]) for part in own})
        files = {part: entry for of_rank in written for part, entry in of_rank.items()}
        together(world, doing, lambda: _publish(aside, final, about, files) if first else None)
    except CheckpointError:
        if first:
            shutil.rmtree(aside, ignore_errors=True)  # gives a full disk its space back
        raise
    if first:
        _prune(folder, final, keep)
    return final


def together(world: Group, doing: str, act: Callable[[], T]) -> list[T]:
    """Run `act` on each rank and share what it returns, in rank order.

    Raises:
        CheckpointError: on every rank alike, if `act` failed on any; names ranks and causes.
    """
    try:
        outcome: tuple[str | None, Any] = (None, act())
    except Exception as error:  # whatever happened here must reach the others, who are waiting
        outcome = (str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}", None)
    outcomes = world.gather_objects(outcome)
    causes: dict[str, list[str]] = {}
    for rank, (message, _) in enumerate(outcomes):
        if message is not None:
            causes.setdefault(message, []).append(str(rank))
    if causes:
        named = "; ".join(f"rank {', '.join(ranks)}: {message}" for message, ranks in causes.items())
        raise CheckpointError(f"could not {doing}: {named}")
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
    try:
        with path.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error


def _publish(aside: Path, final: Path, about: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    for entry in files.values():
        if not (aside / entry["file"]).is_file():
            raise OSError(
                f"{aside / entry['file']} is not visible on rank 0: the run directory must be shared by all nodes"
            )
    content = {"about": dict(about), "files": dict(files)}
    _write_durably(aside / MANIFEST, json.dumps(content | {"sha256": _digest(content)}, indent=1).encode())
    if final.exists():
        if _is_whole(final):
            # This very state, from before a resume. Replacing it would leave a moment without either.
            shutil.rmtree(aside)
            return
        shutil.rmtree(final)
    aside.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return bool(read(path))
    except CheckpointError:
        return False


def _numbered(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; whole or not."""
    found = [(re.fullmatch(r"round_(\d+)_(\d+)", path.name), path) for path in folder.glob("round_*")]
    return [path for *_, path in sorted((int(m[1]), int(m[2]), path) for m, path in found if m)]


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Leave the last `keep` up to `newest`; those after it were refused when the run was resumed before them."""
    found = _numbered(folder)
    kept = found[: found.index(newest) + 1][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


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
    refused = []
    for path in reversed(_numbered(folder)):
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
        altered = manifest["sha256"] != _digest({"about": about, "files": files})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is missing or damaged ({type(error).__name__})") from error
    if altered:
        raise CheckpointError(f"{path / MANIFEST} does not have its own sha256: altered")
    for entry in files.values():
        _verify(path / entry["file"], entry)
    return Checkpoint(path, about, {part: entry["file"] for part, entry in files.items()})


def _verify(file: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    if size != entry["bytes"]:
        raise CheckpointError(f"{file} has {size} bytes, the manifest says {entry['bytes']}: truncated or altered")
    if sha256 != entry["sha256"]:
        raise CheckpointError(f"{file} does not have the sha256 of the manifest: altered")
