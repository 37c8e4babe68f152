"""The manifest: what it says, and that nothing is read out of one that was cut, edited or is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import read_manifest, write_manifest
from tests.shards import PER_SHARD, encoded, small_pictures, write_shards


def test_offsets_point_at_the_images_bytes_and_webdataset_agrees(tmp_path: Path) -> None:
    pictures = small_pictures(43)
    folder = write_shards(tmp_path / "set", pictures)
    manifest = read_manifest(folder)
    expected = [encoded(image, ("jpg", "png")[i % 2]) for i, image in enumerate(pictures)]
    assert [shard.count for shard in manifest.shards] == list(PER_SHARD) and len(manifest) == 43
    shard_n, place_n = manifest.where(np.arange(43))
    assert [list(PER_SHARD)[s] > p >= 0 for s, p in zip(shard_n, place_n, strict=True)] == [True] * 43
    for i, data in enumerate(expected):
        tar = Path(manifest.location(int(shard_n[i]))).read_bytes()
        assert tar[manifest.offsets_N[i] : manifest.offsets_N[i] + manifest.sizes_N[i]] == data
    locations = [manifest.location(s) for s in range(5)]
    samples = list(webdataset.WebDataset(locations, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key for keys in manifest.all_keys() for key in keys]
    assert [sample.get("jpg", sample.get("png")) for sample in samples] == expected
    assert [int(sample["cls"]) for sample in samples] == manifest.labels_N.tolist() == [i % 5 for i in range(43)]


def test_entries_come_from_a_generator_and_the_file_is_json(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", 20, per_shard=6, labels=[])
    manifest = read_manifest(folder)
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["count"] == 20 and tree["classes"] is None and [s["count"] for s in tree["shards"]] == [6, 6, 6, 2]
    write_manifest(tmp_path / "set", (entry for entry in list(manifest.entries())), None)
    assert read_manifest(folder).digest == manifest.digest
    assert manifest.classes is None and manifest.labels_N.tolist() == [-1] * 20
    assert manifest.keys(3) == ["000018", "000019"]
    with pytest.raises(DatasetError, match="no shard number 4; it has 4"):
        manifest.keys(4)


def test_columns_that_a_manifest_may_leave_out(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", 5)
    entries = [
        {key: value for key, value in entry.items() if key not in ("labels", "members", "crc32s")}
        for entry in read_manifest(folder).entries()
    ]
    write_manifest(folder, entries, None)
    assert read_manifest(folder).labels_N.tolist() == [-1] * 5


def test_a_name_may_be_a_location(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", 5)
    for name in ("https://host/a.tar", "pipe:cat a.tar", "/far/a.tar"):
        entries = [{**entry, "name": name} for entry in read_manifest(folder).entries()]
        write_manifest(tmp_path / "other.json", entries, list("01234"))
        assert read_manifest(tmp_path / "other.json").location(0) == name
    assert read_manifest(folder).location(0) == f"{folder}/000000.tar"


def edited(folder: Path, change: Callable[[dict[str, Any]], object], line: int = 1) -> None:
    """Change one shard's line of a manifest."""
    path = folder / "manifest.json"
    lines = path.read_text().splitlines()
    entry = json.loads(lines[line].removesuffix(","))
    change(entry)
    lines[line] = json.dumps(entry) + ("," if lines[line].endswith(",") else "")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.pop("offsets"), r"keys \['offsets'\] are missing"),
        (lambda e: e.update(count=6), "7 keys for a count of 6"),
        (lambda e: [e[k].pop() for k in ("keys", "members", "offsets", "sizes", "labels", "crc32s")], "keys for a c"),
        (lambda e: e["sizes"].pop(), "6 sizes for a count of 7"),
        (lambda e: e["offsets"].__setitem__(2, -5), "offsets: found -5"),
        (lambda e: e["sizes"].__setitem__(2, 0), "sizes: found 0, allowed are 1"),
        (lambda e: e["offsets"].__setitem__(2, 1.5), "offsets: expected whole numbers, found float64"),
        (lambda e: e["offsets"].__setitem__(2, [3]), "offsets: expected whole numbers"),
        (lambda e: e["labels"].__setitem__(2, 5), r"labels up to 5 are used; allowed are -1 \.\. 4"),
        (lambda e: e.update(bytes="12"), "bytes is '12'; allowed: int"),
        (lambda e: e.update(name="000001.tar"), "lists a shard twice"),
    ],
)
def test_a_tampered_entry_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    folder = write_shards(tmp_path)
    edited(folder, change)
    with pytest.raises(DatasetError, match=said) as error:
        read_manifest(folder)
    assert "manifest.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "line . is not a shard's entry"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "ends without its last line"),
        (
            lambda text: "\n".join(text.splitlines()[:1] + text.splitlines()[2:]),
            "says count 43, but its shards hold 36",
        ),
        (lambda text: text.replace("dfkd-shards/1", "dfkd-shards/2"), "'dfkd-shards/2'; allowed: 'dfkd-shards/1'"),
        (lambda text: '{"a": 1}', "not a manifest of shards"),
        (lambda text: "\0" + text, "not a manifest of shards"),
        (lambda text: text.replace('"count": 43', '"count": "43"'), "not a manifest|count is '43'"),
        (lambda text: text.replace('["0", "1", "2", "3", "4"]', "null"), "classes is null, but labels up to 4"),
        (lambda text: text.replace('["0", "1", "2", "3", "4"]', '["0", 1]'), "expected a list of names"),
    ],
)
def test_what_is_no_whole_manifest_is_refused(tmp_path: Path, change: Callable[[str], str], said: str) -> None:
    path = write_shards(tmp_path) / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DatasetError, match=said):
        read_manifest(tmp_path)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="manifest.json: no such file"):
        read_manifest(tmp_path / "nowhere")


def test_a_manifest_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    manifest = read_manifest(write_shards(tmp_path))
    edited(tmp_path, lambda entry: entry["keys"].__setitem__(0, "other"))
    with pytest.raises(DatasetError, match="changed since"):
        list(manifest.all_keys())
