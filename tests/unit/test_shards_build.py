"""Builds: the same bytes whoever makes them, a kill at any moment, and folders that belong to something else."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards import build as build_module
from dfkd_dist.data.shards.build import BuildOptions, build
from dfkd_dist.data.shards.encode import Encoding
from dfkd_dist.data.shards.input_arrays import ArchiveInput
from dfkd_dist.data.shards.input_files import FolderInput
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.shards.verify import verify
from dfkd_dist.data.shards.workplace import Workplace
from tests.image_data import write_folder, write_jpg_npz
from tests.unit.test_shards_inputs import stored


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set, but for the recipe, which names the input's place."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "build.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Slow(ArchiveInput):
    """An archive that takes its time."""

    wait_s = 0.0

    def read(self, i: int) -> bytes:
        time.sleep(self.wait_s)
        return bytes(super().read(i))  # type: ignore[arg-type]


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    source = ArchiveInput(str(write_jpg_npz(tmp_path / "set.npz")))
    options = BuildOptions(maxcount=3, shuffle=5, encoding=Encoding(size=6))
    made = [build(source, tmp_path / f"out{workers}", options, workers=workers) for workers in (1, 2)]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len({manifest.digest for manifest in made}) == 1
    assert sorted(contents(tmp_path / "out1")) == [f"{i:06d}.tar" for i in range(7)] + ["manifest.json"]
    assert not verify(tmp_path / "out1").findings


def test_the_shared_photos_keep_their_bytes(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    source = ArchiveInput(str(shared_data("photos_ood_jpg.npz")))
    manifest = build(source, tmp_path / "out", BuildOptions(maxcount=100, limit=300), workers=2)
    assert [shard.count for shard in manifest.shards] == [100] * 3 and manifest.classes is None
    with np.load(source.path) as archive:
        data, offsets = archive["train_bytes"], archive["train_offsets"]
    for i, (key, image, label) in enumerate(stored(manifest)):
        assert (key, label) == (f"{i:09d}", -1) and image == data[offsets[i] : offsets[i + 1]].tobytes()
    assert not verify(tmp_path / "out", workers=2).findings


def test_shuffle_limit_and_sizes(tmp_path: Path) -> None:
    source = ArchiveInput(str(write_jpg_npz(tmp_path / "set.npz")))
    keys = {}
    for name, options in {
        "plain": BuildOptions(limit=7),
        "one": BuildOptions(shuffle=1),
        "again": BuildOptions(shuffle=1, limit=8),
        "two": BuildOptions(shuffle=2),
    }.items():
        samples = stored(build(source, tmp_path / name, options))
        keys[name] = [key for key, _, _ in samples]
        assert all(data == source.read(int(key)) and label == int(key) % 5 for key, data, label in samples)
    assert keys["plain"] == [f"{i:09d}" for i in range(7)]
    assert (
        keys["again"] == keys["one"][:8] and sorted(keys["one"]) == sorted(keys["two"]) and keys["one"] != keys["two"]
    )
    small = build(source, tmp_path / "small", BuildOptions(maxsize_mb=0.02))
    assert [(shard.count, shard.bytes) for shard in small.shards] == [(8, 20480), (8, 20480), (4, 20480)]
    bare = build(source, tmp_path / "bare", BuildOptions(labels=False))
    assert bare.classes is None and set(bare.labels_N.tolist()) == {-1}
    for keys_ in ({"maxcount": 0}, {"limit": -1}, {"shuffle": -1}, {"maxsize_mb": 0}, {"on_bad": "keep"}):
        with pytest.raises(ValueError, match=f"{next(iter(keys_))}: found"):
            BuildOptions(**keys_)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_keeps_what_is_finished(tmp_path: Path, workers: int) -> None:
    source = Slow(str(write_jpg_npz(tmp_path / "set.npz")))
    options, out = BuildOptions(maxcount=2), tmp_path / "out"
    whole = build(source, tmp_path / "whole", options)
    source.wait_s = 0.05
    if (child := os.fork()) == 0:
        build(source, out, options, workers=workers)
        os._exit(0)
    while len(notes := list((out / ".build").glob("0*.json"))) < 3:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    finished = {note.stem: os.stat(out / f"{note.stem}.tar").st_ino for note in notes}
    assert not (out / "manifest.json").exists() and len(finished) < 10
    assert all((tmp_path / "whole" / path.name).read_bytes() == path.read_bytes() for path in out.glob("*.tar"))
    source.wait_s = 0
    resumed = build(source, out, options)
    assert {name: os.stat(out / f"{name}.tar").st_ino for name in finished} == finished  # not written again
    assert resumed.digest == whole.digest
    # What the killed build's workers had begun ends by itself.
    for _ in range(200):
        if contents(out) == contents(tmp_path / "whole"):
            break
        time.sleep(0.05)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_since_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = ArchiveInput(str(write_jpg_npz(tmp_path / "set.npz"))), tmp_path / "out"
    options = BuildOptions(maxcount=5)
    whole = build(source, tmp_path / "whole", options)
    with monkeypatch.context() as patched:
        patched.setattr(Workplace, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(source, out, options)
    tar = bytearray((out / "000001.tar").read_bytes())
    tar[700] ^= 1
    (out / "000001.tar").write_bytes(tar)
    (out / "000002.tar").unlink()
    (out / ".000003.tar.1.part").write_bytes(b"half")
    assert build(source, out, options).digest == whole.digest
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_build_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = ArchiveInput(str(write_jpg_npz(tmp_path / "set.npz"))), tmp_path / "out"
    build(source, out, BuildOptions())
    monkeypatch.setattr(build_module, "write_shard", None)
    build(source, out, BuildOptions())
    with pytest.raises(DatasetError, match=r"options\.limit was None, is 3; options\.maxcount was 1000, is 2"):
        build(source, out, BuildOptions(limit=3, maxcount=2))
    os.utime(tmp_path / "set.npz")
    with pytest.raises(DatasetError, match=r"input\.changed was"):
        build(ArchiveInput(source.path), out, BuildOptions())


def test_overwrite_replaces_a_build_and_only_a_build(tmp_path: Path) -> None:
    source, out = ArchiveInput(str(write_jpg_npz(tmp_path / "set.npz"))), tmp_path / "out"
    build(source, out, BuildOptions(maxcount=2))
    (out / "mine.txt").write_text("keep")
    build(source, out, BuildOptions(maxcount=10), overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        *("000000.tar", "000001.tar", "build.json", "manifest.json", "mine.txt")
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "000000.tar").write_bytes(b"not ours")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="neither empty nor a build.*000000.tar"):
            build(source, other, BuildOptions(), overwrite=overwrite)
    assert [path.name for path in other.iterdir()] == ["000000.tar"]


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    source, out = Slow(str(write_jpg_npz(tmp_path / "set.npz"))), tmp_path / "out"
    source.wait_s = 0.05
    if (child := os.fork()) == 0:
        build(source, out, BuildOptions(maxcount=5))
        os._exit(0)
    while not (out / "build.json").exists():
        time.sleep(0.005)
    with pytest.raises(DatasetError, match="another build is at work"):
        build(source, out, BuildOptions(maxcount=5))
    assert os.waitpid(child, 0)[1] == 0
    assert len(read_manifest(out)) == 20


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_cannot_be_stored(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path / "in", {"a": 9})
    (root / "a" / "04.jpg").write_bytes(b"no image")
    (root / "a" / "06.png").unlink()
    (root / "a" / "06.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match=r"0[46]\.\w+: .*(neither a jpg|no such file)") as error:
        build(FolderInput(str(root)), tmp_path / "stop", BuildOptions(maxcount=2), workers=workers)
    assert "Traceback" not in str(error.value)
    options = BuildOptions(maxcount=2, on_bad="skip")
    made = build(FolderInput(str(root)), tmp_path / "skip", options, workers=workers)
    assert [key for keys in made.all_keys() for key in keys] == [f"a/0{i}" for i in (0, 1, 2, 3, 5, 7, 8)]
    assert [shard.count for shard in made.shards] == [2, 2, 1, 1, 1]
    lines = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a/04", "a/06"] and "neither a jpg" in lines[0]["reason"]


def test_a_build_of_nothing_but_broken_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", {"a": 3})
    for path in (root / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="not one image could be stored; the first because: .*neither a jpg"):
        build(FolderInput(str(root)), tmp_path / "out", BuildOptions(on_bad="skip"))
