"""Compiled files as far as FFCV is not needed: what they say, what is refused, and how FFCV is asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dfkd_dist.cli import main
from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled.about import LeftOut, about_path, read_compiled
from dfkd_dist.data.compiled.file import Storing
from dfkd_dist.data.compiled.write import compile_shards
from dfkd_dist.data.datasets import load_image_set
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.stream.order import subset
from dfkd_dist.data.stream.sets import open_set, taking_part
from dfkd_dist.data.stream.stream import Stream
from dfkd_dist.engine.select import what_to_select
from tests.compiled import SIDE, write_beton
from tests.image_data import spec_of
from tests.selecting import recipe
from tests.shards import write_shards

IDS, LABELS = [1, 2, 5, 6, 11], [0, 2, 1, 1, -1]
BAD = [LeftOut(8, 2, "corrupt", "half of it"), LeftOut(9, -1, "gif", "a gif file")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_beton(tmp_path / "set.beton", IDS, LABELS, bad=BAD)


def stream(path: Path, **keys: Any) -> Stream:
    reader = ReaderSpec(shards=str(path), kind="ffcv", workers=0)
    options: dict[str, Any] = {"batch": 2, "size": SIDE, "channels": 3, "seed": 0, "rank": 0, "world_size": 1, **keys}
    return Stream(open_set(reader), reader, **options)


def test_its_samples_have_the_numbers_of_their_set(file: Path) -> None:
    found = read_compiled(file)
    manifest = found.manifest
    assert manifest.starts().tolist() == [0, 6, 12] and len(manifest) == 12 and manifest.classes == ("a", "b", "c")
    assert manifest.offsets_N.tolist() == [-3, 0, 1, -3, -3, 2, 3, -3, -1, -2, -3, 4]
    assert manifest.labels_N.tolist() == [-1, 0, 2, -1, -1, 1, 1, -1, 2, -1, -1, -1]
    assert manifest.held_N is not None and np.flatnonzero(manifest.held_N).tolist() == [1, 2, 5, 6, 8, 9, 11]
    assert found.held().tolist() == IDS and set(manifest.sizes_N[IDS]) == {3 * SIDE * SIDE}
    assert manifest.origin == "the digest" != manifest.digest


def test_a_fraction_is_that_of_the_set(file: Path) -> None:
    manifest = read_compiled(file).manifest
    part_N = taking_part(manifest, 0.5, 3)
    assert part_N is not None and (part_N == manifest.held_N & subset(12, 0.5, 3)).all()
    whole = read_compiled(write_beton(file.with_name("whole.beton"), list(range(12)), [0] * 12)).manifest
    assert whole.held_N is None and taking_part(whole, 1.0, 3) is None
    assert (taking_part(whole, 0.5, 3) == subset(12, 0.5, 3)).all()


def change(path: Path, **keys: Any) -> None:
    tree = json.loads(about_path(path).read_text())
    about_path(path).write_text(json.dumps(tree | keys))


def test_damage_is_refused(file: Path, tmp_path: Path) -> None:
    good, said = file.read_bytes(), about_path(file).read_text()
    cases: list[tuple[bytes, dict[str, Any], str]] = [
        (good[:-1], {}, "was cut or replaced"),
        (good[:-24], {"bytes": len(good) - 24}, "the places of 4"),
        (b"", {"bytes": 0}, "it is cut"),
        (b"\x03" + good[1:], {}, "version 3"),
        (good.replace(b"label", b"lapel"), {}, "its fields are"),
        (good, {"count": 4}, "contradicts its JSON"),
        (good, {"samples": 13}, "contradicts its JSON"),
        (good, {"bad": [{"id": 5, "label": 0, "cause": "gif", "detail": ""}]}, "contradicts its JSON"),
        (good, {"samples": 6, "shards": [["a", 6]]}, "ids 1 to 11; allowed are 0 to 5"),
        (good, {"format": "dfkd-compiled/2"}, "allowed: 'dfkd-compiled/1'"),
        (good, {"more": 1}, "not the description of a compiled file"),
    ]
    for content, keys, expected in cases:
        file.write_bytes(content)
        about_path(file).write_text(said)
        change(file, **keys)
        with pytest.raises(DatasetError, match=expected):
            read_compiled(file)
    file.write_bytes(good)
    about_path(file).write_text("[]")
    with pytest.raises(DatasetError, match="not the description"):
        read_compiled(file)
    about_path(file).unlink()
    with pytest.raises(DatasetError, match=r"set\.beton\.json: cannot be read"):
        read_compiled(file)


def test_what_is_no_compiled_file_is_refused(file: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", 4)
    with pytest.raises(DatasetError, match="a compiled file is read by reader.kind: ffcv, found 'tar'"):
        open_set(ReaderSpec(shards=str(file)))
    with pytest.raises(DatasetError, match="allowed for ffcv"):
        open_set(ReaderSpec(shards=str(folder), kind="ffcv"))
    with pytest.raises(DatasetError, match="a path on this machine"):
        open_set(ReaderSpec(shards="https://host/set.beton", kind="ffcv"))
    with pytest.raises(ValidationError, match="cache is a key of kind: tar"):
        ReaderSpec(shards=str(file), kind="ffcv", cache={"folder": "x"})  # type: ignore[arg-type]


def test_another_size_is_refused(file: Path) -> None:
    for size, channels in ((8, 3), (SIDE, 1)):
        with pytest.raises(DatasetError, match=f"compile it anew with --size {size} --channels {channels}"):
            read_compiled(file).check(size, channels)
    with pytest.raises(DatasetError, match="images of 4 px with 3 channel"):
        load_image_set(spec_of("ffcv", file), "test")


def test_a_labelled_image_set_needs_labels_and_its_split(file: Path) -> None:
    for split, expected in (("val", "compiled from 'test' alone"), ("test", "without a label")):
        with pytest.raises(DatasetError, match=expected):
            load_image_set(spec_of("ffcv", file, size=SIDE, channels=3), split)  # type: ignore[arg-type]


def test_dfkd_select_wants_the_shards(file: Path) -> None:
    tree: dict[str, Any] = {"kind": "random", "count": 2}
    spec = recipe(file, [{"name": "t", "arch": "tiny", "weights": "t.safetensors"}], tree, {"kind": "ffcv"})
    with pytest.raises(ValueError, match="is 'ffcv'; allowed for dfkd select: tar"):
        what_to_select(spec)


# ------------------------------------------------------------------------------------------------ without FFCV


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv_it_says_how_to_get_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = write_beton(tmp_path / "labelled.beton", [0, 1], [0, 1])
    asks: list[Any] = [
        lambda: stream(file),
        lambda: load_image_set(spec_of("ffcv", labelled, size=SIDE, channels=3), "test"),
        lambda: compile_shards(str(write_shards(tmp_path / "set", 4)), tmp_path / "out.beton", 8, 3),
    ]
    for ask in asks:
        with pytest.raises(ImportError, match="needs FFCV, which is not installed") as error:
            ask()
        for part in ("scripts/install_ffcv.sh", "libopencv-core-dev", "libturbojpeg0-dev", "dfkd-dist[ffcv]"):
            assert part in str(error.value)
    command = ["shards", "compile", str(tmp_path / "set"), str(tmp_path / "out.beton"), "--size", "8"]
    assert main(command) == 2 and "scripts/install_ffcv.sh" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv_all_else_works(tmp_path: Path) -> None:
    reader = ReaderSpec(shards=str(write_shards(tmp_path / "set", 12)), workers=0)
    manifest = read_manifest(reader.shards)
    tars = Stream(manifest, reader, batch=5, size=8, channels=3, seed=0, rank=0, world_size=1)
    assert tars.get(0, 1).valid_N.all()


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = str(write_shards(tmp_path / "set", 4)), str(tmp_path / "out.beton")
    cases: list[tuple[list[str], str]] = [
        ([out], "either a set of shards or --data"),
        ([shards, out], "--size: found None"),
        ([shards, out, "--size", "0"], "--size: found 0"),
        ([shards, out, "--size", "8", "--quality", "0"], "quality: found 0, allowed are 1 to 100"),
        ([shards, out, "--size", "8", "--mode", "proportion", "--share", "1"], "share: found 1, allowed"),
        ([shards, str(tmp_path / "out.ffcv"), "--size", "8"], "ends in .beton"),
        ([out, "--size", "8", "--data", "kind=digits", "size=8", "channels=1"], "--data has size="),
        ([shards, out, "--data", "kind=digits"], "either a set of shards or --data"),
        ([str(tmp_path / "nowhere"), out, "--size", "8"], "no such file"),
    ]
    for arguments, expected in cases:
        assert main(["shards", "compile", *arguments]) == 2
        assert expected in capsys.readouterr().err
    Path(out).write_bytes(b"")
    assert main(["shards", "compile", shards, out, "--size", "8"]) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err


def test_how_images_are_stored_is_checked() -> None:
    with pytest.raises(ValueError, match="quality: found 101"):
        Storing("jpg", quality=101)
