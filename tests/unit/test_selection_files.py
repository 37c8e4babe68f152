"""Files of a selection: written, followed, refused; compact shards; kept answers, torn ones included."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_dist.data.answers import ANSWERS, DONE, AnswerCache
from dfkd_dist.data.compact import compact
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.selection import Chosen, Selection, SelectionWriter, read_selection
from dfkd_dist.data.shards.files import read_range
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from tests.shards import PER_SHARD, write_shards

CHOSEN = [0, 6, 7, 18, 23, 24, 30, 42]
"""Ids: first and last of shards, and of the set."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(write_shards(tmp_path_factory.mktemp("set")))


def write(path: Path, manifest: Manifest, ids: list[int] = CHOSEN, count: int | None = None) -> None:
    """Sample i has score i / 8, label i % 5 and teacher i % 2."""
    ids_n = np.array(ids)
    shard_n, index_n = manifest.where(ids_n)
    count = len(ids) if count is None else count
    with SelectionWriter(path, manifest, count, {"score": "confidence"}, ["cars", "pets"]) as writer:
        for shard, keys in enumerate(manifest.all_keys()):
            own = shard_n == shard
            scores_n = (ids_n[own] / 8).astype(np.float32)
            writer.add(shard, keys, Chosen(index_n[own], scores_n, ids_n[own] % 5, ids_n[own] % 2))


def test_what_is_written_is_followed(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chosen.jsonl"
    write(path, manifest)
    found = read_selection(path, manifest, labels=True)
    assert np.flatnonzero(found.chosen_N).tolist() == CHOSEN
    assert found.labels_N is not None
    assert found.labels_N[CHOSEN].tolist() == [i % 5 for i in CHOSEN]
    assert (np.delete(found.labels_N, CHOSEN) == -1).all()
    assert found.header["teachers"] == ["cars", "pets"] and found.header["count"] == len(CHOSEN)
    assert read_selection(path, manifest).labels_N is None
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["manifest"] == manifest.digest and head["samples"] == sum(PER_SHARD)
    assert lines[1] == {
        "shard": "000000.tar",
        "index": 6,
        "key": "000006",
        "score": 0.75,
        "label": 1,
        "teacher": "cars",
    }
    assert list(tmp_path.rglob("*.part")) == []


def test_nothing_may_be_chosen_and_little_may_be_said(manifest: Manifest, tmp_path: Path) -> None:
    with SelectionWriter(tmp_path / "none", manifest, 0, {}, []):
        pass
    assert not read_selection(tmp_path / "none", manifest).chosen_N.any()
    with SelectionWriter(tmp_path / "bare", manifest, 1, {}, []) as writer:
        writer.add(2, manifest.keys(2), Chosen(np.array([4])))
    bare = read_selection(tmp_path / "bare", manifest, labels=True)
    assert bare.labels_N is not None and bare.labels_N[23] == -1 and bare.chosen_N[23]


def test_a_broken_writer_leaves_nothing(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "chosen.jsonl"
    with pytest.raises(KeyboardInterrupt), SelectionWriter(path, manifest, 1, {}, []):
        raise KeyboardInterrupt
    with pytest.raises(DatasetError, match="8 samples were written, but 9 were chosen"):
        write(path, manifest, count=9)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match="cannot be written"):
        write(Path("/proc/none/chosen.jsonl"), manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-1], "count 8, but holds 7 samples; it was cut"),
        (lambda lines: [*lines, lines[-1]], "line 10: 000004.tar, index 9 occurs twice"),
        (lambda lines: [lines[0].replace("dfkd-selection/1", "else/1"), *lines[1:]], "format is 'else/1'; allowed"),
        (lambda lines: [], "not a selection"),
        (lambda lines: ["[1, 2]"], "format is 'list'"),
        (lambda lines: [*lines[:3], "{", *lines[4:]], "line 4 is not JSON"),
        (lambda lines: [lines[0], lines[1].replace("000000.tar", "x.tar")], "line 2: names no shard"),
        (lambda lines: [lines[0], lines[1].replace('"index": 0', '"index": 7')], "index is 7; allowed .* 0 to 6"),
        (lambda lines: [lines[0], lines[1].replace('"label": 0', '"label": "cat"')], "label is 'cat'; allowed"),
        (lambda lines: [lines[0].replace('"count": 8', '"count": null')], "count is None"),
    ],
)
def test_refusals_name_the_line(manifest: Manifest, tmp_path: Path, edit: object, message: str) -> None:
    path = tmp_path / "chosen.jsonl"
    write(path, manifest)
    path.write_text("".join(line + "\n" for line in edit(path.read_text().splitlines())))  # type: ignore[operator]
    with pytest.raises(DatasetError, match=message):
        read_selection(path, manifest, labels=True)


def test_another_set_and_no_file_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    write(tmp_path / "chosen.jsonl", manifest)
    with pytest.raises(DatasetError, match="made for another set of shards"):
        read_selection(tmp_path / "chosen.jsonl", replace(manifest, digest="0" * 64))
    with pytest.raises(DatasetError, match="no such file"):
        read_selection(tmp_path / "none.jsonl", manifest)


def test_compact_shards_hold_the_original_bytes(manifest: Manifest, tmp_path: Path) -> None:
    write(tmp_path / "chosen.jsonl", manifest)
    selection = read_selection(tmp_path / "chosen.jsonl", manifest, labels=True)
    made = compact(manifest, selection, tmp_path / "small", ["a", "b", "c", "d", "e"])
    assert made.labels_N.tolist() == [i % 5 for i in CHOSEN] and made.classes == ("a", "b", "c", "d", "e")
    assert [key for keys in made.all_keys() for key in keys] == [f"{i:09d}" for i in CHOSEN]
    for new, old in enumerate(CHOSEN):
        assert _bytes(made, new) == _bytes(manifest, old)
    assert read_manifest(compact(manifest, selection, tmp_path / "small", list("abcde")).path).digest == made.digest
    other = replace(selection, chosen_N=selection.chosen_N & (np.arange(43) > 3))
    with pytest.raises(DatasetError, match="from another input"):
        compact(manifest, other, tmp_path / "small", list("abcde"))
    unlabelled = compact(manifest, Selection(selection.chosen_N, None, {}), tmp_path / "plain")
    assert unlabelled.classes is None and (unlabelled.labels_N == -1).all()


def _bytes(manifest: Manifest, sample: int) -> bytes:
    shard = int(manifest.where(np.array([sample]))[0][0])
    return read_range(manifest.location(shard), int(manifest.offsets_N[sample]), int(manifest.sizes_N[sample]))


# ------------------------------------------------------------------------------------------- kept answers


def cache(folder: Path, **facts: object) -> AnswerCache:
    return AnswerCache(folder, {"teacher": "abc", **facts}, samples=20, classes=3)


def answers(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_answers_come_back_bit_for_bit(tmp_path: Path) -> None:
    said = answers(0, 7)
    said[2] = float("nan")
    with cache(tmp_path) as first, cache(tmp_path) as second:
        assert first.read(1, 8, 7) is None and not first.has(1)
        first.write(1, 8, said)
        found = second.read(1, 8, 7)  # another process's view
        assert found is not None and torch.equal(found.nan_to_num(9), said.nan_to_num(9)) and second.has(1)
        second.write(0, 0, answers(1, 8).double())
        assert torch.equal(first.read(0, 0, 8), answers(1, 8))  # type: ignore[arg-type]
    with cache(tmp_path) as again, cache(tmp_path, size=32) as other:
        assert again.has(0) and again.has(1)
        assert not other.has(0) and other.path != again.path


def test_torn_and_stale_answers_are_not_used(tmp_path: Path) -> None:
    with cache(tmp_path) as kept:
        for chunk in range(4):
            kept.write(chunk, 5 * chunk, answers(chunk, 5))
        assert kept.read(2, 10, 5) is not None
        with (kept.path / ANSWERS).open("r+b") as file:  # rows that never reached the disk, or are another's
            file.seek(4 * 3 * 11)
            file.write(b"\0" * 4)
        assert kept.read(2, 10, 5) is None and kept.has(2)
        assert kept.read(1, 5, 4) is None  # not the rows that the sum is of
        assert kept.read(3, 15, 5) is not None
        os.truncate(kept.path / ANSWERS, 4 * 3 * 17)
        assert kept.read(3, 15, 5) is None
        os.truncate(kept.path / DONE, 8 + 4)
        assert kept.read(0, 0, 5) is not None and kept.read(1, 5, 5) is None
    with cache(tmp_path) as again:  # rows and marks are written anew
        again.write(3, 15, answers(3, 5))
        assert torch.equal(again.read(3, 15, 5), answers(3, 5))  # type: ignore[arg-type]


def test_no_room_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="take 120,000,000,000,000 bytes .* but the disk has"):
        AnswerCache(tmp_path, {}, samples=10**13, classes=3)
    with pytest.raises(DatasetError, match="cannot keep a teacher's answers there"):
        cache(Path("/proc/none"))
