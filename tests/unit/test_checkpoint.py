"""Checkpoints that are damaged in any way are refused by name, and the one before is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.engine import checkpoint
from dfkd_dist.engine.checkpoint import MANIFEST, CheckpointError
from dfkd_dist.parallel.group import ALONE

PARTS: dict[str, Any] = {"student": {"w": torch.arange(6.0).view(2, 3), "steps": 3}, "generator/t0": [torch.ones(2)]}


def save(folder: Path, round: int, tick: int = 0, keep: int = 3, **parts: Any) -> Path:
    about = {"round": round, "tick": tick, "seconds": 1.5}
    return checkpoint.save(folder, about, parts or PARTS, ALONE, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> str:
    found = checkpoint.latest(folder, ALONE)
    assert found is not None
    return found.path.name


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7, 2)
    assert path.name == "round_00000007_0002"
    found = checkpoint.latest(tmp_path / "checkpoints", ALONE)
    assert found is not None and found.path == path
    assert found.about == {"round": 7, "tick": 2, "seconds": 1.5}
    assert found.files.keys() == PARTS.keys()
    student = found.part("student")
    assert torch.equal(student["w"], PARTS["student"]["w"]) and student["steps"] == 3
    with pytest.raises(CheckpointError, match="no part 'teacher'; there are: generator/t0, student"):
        found.part("teacher")


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent", ALONE) is None
    assert checkpoint.latest(tmp_path, ALONE) is None


def _truncate(path: Path) -> str:
    file = path / "student.pt"
    os.truncate(file, file.stat().st_size - 1)
    return "student.pt has"


def _alter(path: Path) -> str:
    flip(path / "generator--t0.pt", 300)
    return "generator--t0.pt does not have the sha256"


def _lose_a_part(path: Path) -> str:
    (path / "student.pt").unlink()
    return "student.pt cannot be read"


def _lose_the_manifest(path: Path) -> str:
    (path / MANIFEST).unlink()
    return f"{MANIFEST} is missing"


def _truncate_the_manifest(path: Path) -> str:
    os.truncate(path / MANIFEST, 40)
    return f"{MANIFEST} is missing or damaged"


def _alter_a_position(path: Path) -> str:
    """One flipped bit that leaves valid JSON: round 3 becomes round 2."""
    text = (path / MANIFEST).read_bytes()
    flip(path / MANIFEST, text.index(b'"round": 3') + len('"round": '))
    assert json.loads((path / MANIFEST).read_text())["about"]["round"] == 2
    return f"{MANIFEST} does not have its own sha256"


def _point_elsewhere(path: Path) -> str:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"student.pt"', '"../secret"'))
    return f"{MANIFEST} does not have its own sha256"


def _replace_the_manifest(path: Path) -> str:
    (path / MANIFEST).write_text("[]")
    return f"{MANIFEST} is missing or damaged"


DAMAGES: list[Callable[[Path], str]] = [
    _truncate, _alter, _lose_a_part, _lose_the_manifest, _truncate_the_manifest, _alter_a_position, _point_elsewhere,
    _replace_the_manifest,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = save(tmp_path, 2), save(tmp_path, 3)
    said = damage(last)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.read(last)
    assert f"{last / said.split()[0]}" in str(refused.value) and said in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == before.name
    assert said in caplog.text
    damage_before = _truncate(before)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole") as none:
        checkpoint.latest(tmp_path, ALONE)
    assert said in str(none.value) and damage_before in str(none.value)


def test_every_byte_of_a_part_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1, student=torch.ones(3))
    for at in range(0, (path / "student.pt").stat().st_size, 97):
        flip(path / "student.pt", at)
        with pytest.raises(CheckpointError, match="student.pt does not have the sha256"):
            checkpoint.read(path)
        flip(path / "student.pt", at)
    checkpoint.read(path)


def test_the_folder_of_a_killed_save_is_no_checkpoint_and_goes_at_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for leftover in (".tmp_round_00000002_0000", ".tmp_round_00000009_0004"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "student.pt").write_bytes(b"half")
    assert newest(tmp_path) == "round_00000001_0000"
    save(tmp_path, 2)
    assert names(tmp_path) == ["round_00000001_0000", "round_00000002_0000"]


def test_the_last_k_are_kept_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for round, tick in ((8, 0), (9, 10_000), (9, 10_001), (10, 0)):
        save(tmp_path, round, tick, keep=2)
    assert names(tmp_path) == ["round_00000009_10001", "round_00000010_0000"]
    save(tmp_path, 10, 9_999, keep=2)
    save(tmp_path, 10, 10_000, keep=2)
    assert newest(tmp_path) == "round_00000010_10000"
    assert names(tmp_path) == ["round_00000010_10000", "round_00000010_9999"]


def test_a_damaged_later_checkpoint_never_displaces_a_good_one(tmp_path: Path) -> None:
    """A run resumed before a damaged checkpoint saves at an earlier position than that one's."""
    save(tmp_path, 1)
    _truncate(save(tmp_path, 5))
    assert newest(tmp_path) == "round_00000001_0000"
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["round_00000003_0000"]


def test_saving_again_at_the_same_position(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    inode = path.stat().st_ino
    save(tmp_path, 4)
    assert path.stat().st_ino == inode, "a whole checkpoint was taken away before its successor stood"
    _truncate(path)
    save(tmp_path, 4)
    assert names(tmp_path) == [path.name]
    checkpoint.read(path)


def test_a_part_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = save(tmp_path / "checkpoints", 1, student=Harmful())
    found = checkpoint.read(path)  # its checksums are right: whoever put the code there can compute them
    with pytest.raises(CheckpointError, match="student.pt was refused .*only tensors and plain values") as refused:
        found.part("student")
    assert "weights_only=False" not in str(refused.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("failing", ["student.pt", MANIFEST])
def test_a_failed_save_leaves_nothing_and_spoils_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)
    write = checkpoint._write_durably

    def full(path: Path, content: bytes | memoryview) -> None:
        if path.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(checkpoint, "_write_durably", full)
    with pytest.raises(CheckpointError) as raised:
        save(tmp_path, 2, keep=1)
    for part in ("rank 0: OSError", "No space left on device", failing, "the one before is still good"):
        assert part in str(raised.value)
    assert names(tmp_path) == ["round_00000001_0000"]
    assert newest(tmp_path) == "round_00000001_0000"


def test_a_folder_that_is_a_file_is_an_error_of_the_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="rank 0: (NotADirectory|FileExists)Error"):
        save(tmp_path / "checkpoints", 1)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("round_best", "notes"):
        (tmp_path / name).mkdir()
    for round in range(1, 5):
        save(tmp_path, round, keep=1)
    assert names(tmp_path) == ["notes", "round_00000004_0000", "round_best"]
    shutil.rmtree(tmp_path / "round_00000004_0000")
    assert checkpoint.latest(tmp_path, ALONE) is None
