"""The folder of a build that may be killed at any moment: what is being built, what is finished, who is at it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import sha256_of
from dfkd_dist.data.shards.manifest import MANIFEST, NO_LABEL, write_manifest

log = logging.getLogger(__name__)

RECIPE = "build.json"
"""What the shards were built from and how; stays beside the manifest."""
SKIPPED = "skipped.jsonl"
"""Written where images were left out: one line with `key`, `where` and `reason` for each."""
_HIDDEN = ".build"
_TAR = re.compile(r"\d{6,}\.tar")
INDEX = "index"
"""The recipe's kind where tars were left where they are."""


class Workplace:
    """The folder that shards are built in.

    Until the manifest is written, `.build/` holds one entry for each finished shard. An entry is written after its
    shard and both are renamed into place, so that whatever has an entry is whole.
    """

    def __init__(self, folder: Path, *, may_hold_tars: bool = False) -> None:
        """Touches nothing yet. `may_hold_tars`: a folder of tars that shall get a manifest is no mistake."""
        self.folder = folder
        self._may_hold_tars = may_hold_tars
        self._hidden = folder / _HIDDEN

    def shard_path(self, number: int) -> Path:
        """Where shard `number` is written."""
        return self.folder / f"{number:06d}.tar"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other builds out; DatasetError if one is at work. The system gives up a dead process's hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hidden.mkdir(exist_ok=True)
        with (self._hidden / "lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DatasetError(f"{self.folder}: another build is at work in this folder") from error
            yield

    def is_finished(self, recipe: dict[str, Any]) -> bool:
        """Whether the manifest is there; DatasetError if the folder holds something else than this recipe's shards."""
        before = self.begun()
        if before is None:
            return False
        if before != recipe:
            changes = "; ".join(_changes(before, recipe))
            raise DatasetError(
                f"{self.folder}: was begun from another input or with other options: {changes} "
                "(overwrite it, or choose another folder)"
            )
        return (self.folder / MANIFEST).is_file()

    def begin(self, recipe: dict[str, Any]) -> None:
        """Note the recipe, and remove what a killed build left half-written."""
        for path in self.folder.glob(".*.part"):
            path.unlink(missing_ok=True)
        _write_aside(self.folder / RECIPE, json.dumps(recipe, indent=1) + "\n")

    def clear(self) -> None:
        """Remove what an earlier build wrote, and nothing else; tars that are or were only indexed stay.

        Its recipe stays until `begin` replaces it, so that a kill leaves no folder that seems to be somebody else's.
        """
        before = self.begun()
        if before is None:
            return
        ours = [self.folder / MANIFEST, self.folder / SKIPPED, *self._hidden.glob("*.json")]
        if not self._may_hold_tars:
            if before.get("kind") == INDEX:
                raise DatasetError(f"{self.folder}: its tars were indexed, not built, and stay; choose another folder")
            ours += [path for path in self.folder.iterdir() if _TAR.fullmatch(path.name)]
        for path in ours:
            path.unlink(missing_ok=True)

    def begun(self) -> dict[str, Any] | None:
        """The recipe of what was begun here; None for an empty folder (or tars to index); otherwise a DatasetError."""
        if (self.folder / RECIPE).is_file():
            try:
                return dict(json.loads((self.folder / RECIPE).read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise DatasetError(f"{self.folder / RECIPE}: not the recipe of a build: {error}") from error
        found = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        if self._may_hold_tars and MANIFEST not in found:
            return None
        if found := sorted(name for name in found if not name.startswith(".")):
            raise DatasetError(
                f"{self.folder}: is neither empty nor a build that could go on; found {', '.join(found[:3])} ..."
            )
        return None

    def note(self, number: int, entry: dict[str, Any] | None, skipped: Sequence[dict[str, str]] = ()) -> None:
        """Shard `number` is finished: its entry (None: no images, no file), and the images that were left out."""
        text = json.dumps({"entry": entry, "skipped": list(skipped)}, separators=(",", ":"))
        _write_aside(self._hidden / f"{number:06d}.json", text)

    def noted(self, number: int) -> dict[str, Any] | None:
        """What was noted of a shard, or None if it is not finished."""
        path = self._hidden / f"{number:06d}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def is_whole(self, note: dict[str, Any], number: int) -> bool:
        """Whether a finished shard's file still has the noted size and check sum."""
        if (entry := note["entry"]) is None:
            return True
        path = self.shard_path(number)
        return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]

    def finish(self, shards: int, classes: list[str] | None) -> None:
        """Write the manifest (and the list of skipped images) out of the notes.

        Classes are numbered where labels were found and None given. Raises DatasetError if there are no images.
        """
        highest, skipped = self._summed_up(shards)
        if classes is None and highest > NO_LABEL:
            classes = [str(i) for i in range(highest + 1)]
        if skipped:
            _write_aside(self.folder / SKIPPED, "".join(json.dumps(line) + "\n" for line in skipped))
            log.warning("%s: %d left out; %s says what and why", self.folder, len(skipped), SKIPPED)
        write_manifest(self.folder, (note["entry"] for note in self._notes(shards) if note["entry"]), classes)

    def leave(self) -> None:
        """Forget the notes."""
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _summed_up(self, shards: int) -> tuple[int, list[dict[str, str]]]:
        highest, images, skipped = NO_LABEL, 0, []
        for note in self._notes(shards):
            skipped += note["skipped"]
            if note["entry"]:
                images += note["entry"]["count"]
                highest = max(highest, *note["entry"]["labels"])
        if not images:
            reason = f"; the first because: {skipped[0]['reason']}" if skipped else ""
            raise DatasetError(f"{self.folder}: not one image could be stored{reason}")
        return highest, skipped

    def _notes(self, shards: int) -> Iterator[dict[str, Any]]:
        for number in range(shards):
            note = self.noted(number)
            if note is None:
                raise DatasetError(f"{self._hidden}: the entry of shard {number} is gone; build again")
            yield note


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys that differ, with both values."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {str(old)[:80]}, is {str(new)[:80]}")
    return found
