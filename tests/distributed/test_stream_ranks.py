"""Streams on real gloo ranks with reading processes: one order on any number of ranks, also after a stop; one list."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from dfkd_dist.config import CacheSpec, ReaderSpec
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.stream.stream import Quarantine, Stream, chunks_of, scan
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.topology import bounds
from tests.distributed.harness import run_ranks, start_ranks
from tests.encoded import bad_files, picture, save
from tests.faulty_http import serve
from tests.shards import write_shards

pytestmark = pytest.mark.distributed

BATCH, STEPS = 6, 15
Batches = list[tuple[list[int], list[bool], int]]
"""Of each global batch: ids, which are valid, and the sum of all pixels."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 unequal shards: 43 good samples, and 3 that cannot be read."""
    bad = [data for _, data in list(bad_files().values())[-3:]]
    files = [save(picture(8, 8, seed=i), "JPEG") for i in range(20)] + bad
    files += [save(picture(8, 8, seed=i), "JPEG") for i in range(20, 43)]
    return write_shards(tmp_path_factory.mktemp("shards"), files, per_shard=(9, 14, 5, 7, 11))


def _may_have_children() -> None:
    """A rank of these tests is a daemon of the test's process; a launcher's is not."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _stream(rank: int, size: int, where: str, folder: Path, workers: int, **keys: Any) -> Stream:
    _may_have_children()
    reader = ReaderSpec(shards=where, workers=workers, window=10, bad_limit=1.0, **keys)
    manifest, quarantine = read_manifest(where), Quarantine(folder, rank)
    options: dict[str, Any] = {"batch": BATCH, "size": 8, "channels": 3, "seed": 3, "quarantine": quarantine}
    return Stream(manifest, reader, rank=rank, world_size=size, **options)


def _batches(
    rank: int, size: int, where: str, folder: Path, workers: int, start: int, stop: int, keys: dict[str, Any]
) -> Batches:
    """Steps `start` to `stop` of a run, put together from all ranks; the same on all of them."""
    group = Group(tuple(range(size)), rank, dist.group.WORLD)
    stream = _stream(rank, size, where, folder, workers, **keys)
    assert len(set(group.gather_objects(stream.batches))) == 1
    seen: Batches = []
    for step in range(start, stop):
        raw = stream.get(*divmod(step, stream.batches))
        assert raw.slots_N.tolist() == list(range(*bounds(BATCH, size, rank)))
        mine = (raw.ids_N.tolist(), raw.valid_N.tolist(), int(raw.images_NCHW.long().sum()))
        ids, valid, pixels = zip(*group.gather_objects(mine), strict=True)
        seen.append((sum(ids, []), sum(valid, []), sum(pixels)))
    stream.close()
    return seen


def _run(
    size: int, shards: Path | str, folder: Path, workers: int, start: int = 0, stop: int = STEPS, **keys: Any
) -> Batches:
    results = run_ranks(_batches, size, str(shards), folder, workers, start, stop, keys)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """One process, no reading processes."""
    return _run(1, shards, tmp_path_factory.mktemp("alone"), 0)


def test_one_order_on_any_number_of_ranks(shards: Path, alone: Batches, tmp_path: Path) -> None:
    for size in (2, 3, 4):
        assert _run(size, shards, tmp_path / str(size), 0) == alone
    epoch = [i for ids, _, _ in alone[:7] for i in ids]
    assert len(set(epoch)) == 42 and sum(not v for _, valid, _ in alone[:7] for v in valid) in (2, 3)


def test_stopped_and_resumed_on_other_numbers_of_ranks(shards: Path, alone: Batches, tmp_path: Path) -> None:
    """With reading processes, which have read ahead when the run stops; one list of bad samples throughout."""
    seen = _run(2, shards, tmp_path, 2, 0, 5)
    seen += _run(4, shards, tmp_path, 0, 5, 10)
    seen += _run(1, shards, tmp_path, 1, 10, 15)
    assert seen == alone
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    bad = {i for ids, valid, _ in alone for i, is_valid in zip(ids, valid, strict=True) if not is_valid}
    assert sorted(line["id"] for line in listed) == sorted(bad) and len(bad) == 3


def test_ranks_share_copies_of_remote_shards(shards: Path, alone: Batches, tmp_path: Path) -> None:
    with serve(shards) as server:
        server.fault = lambda path, before: "500" if path.endswith(".tar") and before == 0 else None
        cache = CacheSpec(folder=str(tmp_path / "copies"), limit_gb=1.0)
        assert _run(3, server.url, tmp_path, 0, cache=cache) == alone
        asked = [count for path, count in server.asked.items() if path.endswith(".tar")]
    assert asked == [2] * 5  # one failure, one copy, whoever was first


def _scores(rank: int, size: int, where: str) -> dict[int, int]:
    """Something of every sample of this rank's chunks."""
    manifest = read_manifest(where)
    chunks = chunks_of(manifest, 4)
    low, high = bounds(len(chunks), size, rank)
    reader = ReaderSpec(shards=where, workers=0, bad_limit=1.0)
    found = {}
    for raw in scan(manifest, reader, batch=4, size=8, channels=3, chunks=chunks[low:high]):
        sums = raw.images_NCHW.long().sum(dim=(1, 2, 3))
        for i, value in zip(raw.ids_N.tolist(), sums.tolist(), strict=True):
            assert i not in found
            found[i] = value
    return found


def test_scoring_sees_every_sample_exactly_once(shards: Path) -> None:
    (alone,) = run_ranks(_scores, 1, str(shards))
    assert sorted(alone) == list(range(46))
    for size in (2, 4):
        parts = run_ranks(_scores, size, str(shards))
        assert sum(len(part) for part in parts) == 46
        assert {i: value for part in parts for i, value in part.items()} == alone


def _read_for_ever(rank: int, size: int, where: str, folder: Path) -> None:
    stream = _stream(rank, size, where, folder, 2)
    stream.get(0, 0)
    print("readers", *(process.pid for process in stream._loader._processes), file=sys.stderr, flush=True)
    while True:
        time.sleep(0.1)


def test_readers_end_with_a_rank_that_is_killed(shards: Path, tmp_path: Path) -> None:
    (rank,) = start_ranks(_read_for_ever, 1, str(shards), tmp_path)
    try:
        end = time.monotonic() + 60
        while "readers" not in rank.stderr() and time.monotonic() < end:
            time.sleep(0.1)
        readers = [int(pid) for pid in rank.stderr().partition("readers")[2].split()]
        assert len(readers) == 2 and all(psutil.pid_exists(pid) for pid in readers)
        rank.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10
        while any(map(_runs, readers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(_runs, readers))
    finally:
        rank.end()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_OPEN: list[Stream] = []


def _end_without_closing(rank: int, size: int, where: str, folder: Path) -> int:
    _OPEN.append(_stream(rank, size, where, folder, 1))
    _OPEN[0].get(0, 0)
    return os.getpid()


def test_a_rank_that_forgets_to_close_ends(shards: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    run_ranks(_end_without_closing, 1, str(shards), tmp_path)
    assert time.monotonic() - started < 55


def test_pixels_are_the_same_numbers(shards: Path, alone: Batches) -> None:
    """The sums above tell batches apart."""
    assert len({pixels for _, _, pixels in alone}) == len(alone)
