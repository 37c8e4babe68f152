"""The list of bad samples: one line for each, whoever finds it and however often, also over crashes and resumes."""

import json
import multiprocessing
from pathlib import Path

import pytest

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Bad
from dfkd_dist.data.stream.quarantine import Quarantine


def bad(i: int, cause: str = "corrupt") -> Bad:
    return Bad(i, "000001.tar", i % 10, cause, f"detail of {i}")


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines() if line]


def test_a_sample_is_listed_once(tmp_path: Path) -> None:
    first, second = Quarantine(tmp_path / "run", 0), Quarantine(tmp_path / "run", 1)
    first.add([bad(1), bad(2, "gif")], 10)
    second.add([bad(2, "gif"), bad(3)], 10)
    first.add([bad(3), bad(1), bad(4)], 10)
    found = lines(tmp_path / "run")
    assert [(line["id"], line["rank"]) for line in found] == [(1, 0), (2, 0), (3, 1), (4, 0)]
    assert found[1] == {
        "id": 2, "shard": "000001.tar", "index": 2, "cause": "gif", "detail": "detail of 2", "rank": 0,
    }  # fmt: skip
    assert first.counts == {"corrupt": 3, "gif": 1}


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0).add([bad(1), bad(2)], 10)
    resumed = Quarantine(tmp_path, 0)
    assert resumed.counts == {"corrupt": 2} and resumed.asked == 0
    resumed.add([bad(2), bad(5, "cmyk")], 10)
    assert resumed.counts == {"corrupt": 2, "cmyk": 1}
    assert [line["id"] for line in lines(tmp_path)] == [1, 2, 5]


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0).add([bad(1)], 10)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"id": 2, "cau')
    resumed = Quarantine(tmp_path, 0)
    resumed.add([bad(2), bad(3)], 10)
    resumed.add([bad(4)], 10)
    text = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in [text[0], *text[2:]]] == [1, 2, 3, 4]
    assert Quarantine(tmp_path, 0).counts == {"corrupt": 4}


def test_nothing_is_written_without_need(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run", 0)
    quarantine.add([], 1000)
    quarantine.check(0.0)
    assert not (tmp_path / "run").exists()
    in_memory = Quarantine(None)
    in_memory.add([bad(1), bad(1), bad(2)], 10)
    assert in_memory.counts == {"corrupt": 2} and in_memory.bad == 3


def _find(folder: str, rank: int) -> None:
    quarantine = Quarantine(folder, rank)
    for start in range(0, 200, 5):
        quarantine.add([bad((i * 7 + rank) % 100) for i in range(start, start + 5)], 50)


def test_ranks_write_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_find, args=(str(tmp_path), rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert sorted(line["id"] for line in lines(tmp_path)) == list(range(100))  # type: ignore[type-var]


def test_the_share_is_limited_once_there_are_a_hundred(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0)
    quarantine.add([bad(i) for i in range(20)], 99)
    quarantine.check(0.01)
    quarantine.add([bad(20, "truncated")], 101)
    quarantine.check(0.105)
    message = r"21 of 200 samples \(10.5%\) could not be used \(corrupt 20, truncated 1\); allowed by .*: 10.0%"
    with pytest.raises(DatasetError, match=message):
        quarantine.check(0.1)
