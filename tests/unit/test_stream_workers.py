"""Reading processes: the same batches as without them, in order, ahead of time; and what happens when one fails."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.loading import Loader
from dfkd_dist.data.stream.locating import Locator
from dfkd_dist.data.stream.opening import open_reader
from dfkd_dist.data.stream.reading import ImageReader
from dfkd_dist.data.stream.ring import LENT, Ring
from dfkd_dist.data.stream.stream import Quarantine, RawBatch, Stream, chunks_of, scan
from tests.encoded import bad_files, picture, save
from tests.failing_readers import Failing, Stuck
from tests.faulty_http import serve
from tests.shards import write_shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """43 good samples and 3 bad ones in unequal shards."""
    bad = [data for _, data in list(bad_files().values())[:3]]
    files = [save(picture(8, 8, seed=i), "JPEG") for i in range(43)] + bad
    return read_manifest(write_shards(tmp_path_factory.mktemp("shards"), files))


def stream(manifest: Manifest, workers: int, **keys: Any) -> Stream:
    reader = ReaderSpec(shards=manifest.path, workers=workers, window=10, bad_limit=1.0, prefetch=2)
    options: dict[str, Any] = {"batch": 6, "size": 8, "channels": 3, "seed": 1, "rank": 0, "world_size": 1}
    return Stream(manifest, reader, **{**options, **keys})


@pytest.fixture(scope="module")
def two(manifest: Manifest) -> Iterator[Stream]:
    made = stream(manifest, 2)
    yield made
    made.close()


def same(one: RawBatch, other: RawBatch) -> bool:
    names = ("images_NCHW", "valid_N", "slots_N", "ids_N", "labels_N")
    return one.bad == other.bad and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_processes_change_nothing(manifest: Manifest, two: Stream) -> None:
    plain = stream(manifest, 0)
    steps = [divmod(i, 7) for i in range(17)]
    steps += [(5, 2), (5, 3), (0, 0), (0, 0), (0, 1), (3, 6), (4, 0), (4, 1)]  # jumps, and repeats
    for epoch, g in steps:
        assert same(two.get(epoch, g), plain.get(epoch, g)), (epoch, g)
    for mask in (np.arange(46) % 2 == 0, None):
        two.choose(mask)
        plain.choose(mask)
        for g in range(plain.batches):
            assert same(two.get(1, g), plain.get(1, g))
    assert two.quarantine.counts == plain.quarantine.counts and sum(two.quarantine.counts.values()) == 3


def test_batches_may_be_kept(manifest: Manifest, two: Stream) -> None:
    plain = stream(manifest, 0)
    kept = [two.get(0, g) for g in range(7)] + [two.get(1, g) for g in range(7)]
    views = [raw.images_NCHW[1:3].permute(0, 2, 3, 1) for raw in kept]
    ids = [raw.ids_N for raw in kept]
    del kept
    for g in range(7):
        two.get(2, g)  # goes over the memory that is free
    for i, view in enumerate(views):
        again = plain.get(*divmod(i, 7))
        assert torch.equal(view, again.images_NCHW[1:3].permute(0, 2, 3, 1)) and torch.equal(ids[i], again.ids_N)


def test_the_process_s_random_numbers_are_left_alone(manifest: Manifest, two: Stream) -> None:
    before = torch.get_rng_state()
    two.get(0, 3)
    two.get(2, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_signals_are_the_rank_s_matter(two: Stream) -> None:
    two.get(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        for process in two._loader._processes:
            assert process.pid is not None
            os.kill(process.pid, number)
    for g in range(1, 7):
        two.get(0, g)
    assert all(process.is_alive() for process in two._loader._processes)


def test_a_scan_by_processes(manifest: Manifest) -> None:
    chunks = chunks_of(manifest, 5)
    keys: dict[str, Any] = {"batch": 5, "size": 8, "channels": 1, "chunks": chunks}
    plain = list(scan(manifest, ReaderSpec(shards=manifest.path, workers=0), **keys))
    quarantine = Quarantine(None)
    seen = list(scan(manifest, ReaderSpec(shards=manifest.path, workers=2), **keys, quarantine=quarantine))
    assert len(seen) == len(plain) == len(chunks)
    assert all(same(one, other) for one, other in zip(seen, plain, strict=True))
    assert quarantine.bad == 3 and quarantine.asked == 46


def test_processes_read_over_http(manifest: Manifest) -> None:
    pytest.importorskip("aiohttp")
    with serve(Path(manifest.path).parent) as server:
        far, plain = stream(read_manifest(server.url), 1), stream(manifest, 0)
        for g in range(7):
            assert same(far.get(0, g), plain.get(0, g))
        far.close()


def test_a_scan_that_is_left_ends_its_processes(manifest: Manifest) -> None:
    reader = ReaderSpec(shards=manifest.path, workers=2)
    before = set(children())
    coming = scan(manifest, reader, batch=2, size=8, channels=3, chunks=chunks_of(manifest, 2))
    next(coming)
    assert set(children()) - before
    coming.close()  # type: ignore[attr-defined]
    assert not set(children()) - before


def children() -> list[int]:
    """The processes of this one's fork server: its reading processes."""
    return [p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_process_is_an_error_at_once(manifest: Manifest, busy: bool) -> None:
    s = stream(manifest, 2)
    s.get(0, 0)
    (victim, _) = s._loader._processes
    assert victim.pid is not None
    if busy:
        os.kill(victim.pid, signal.SIGSTOP)
    os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"reading process {victim.pid} of the stream died \(killed by signal 9"):
        for step in range(1, 30):
            s.get(*divmod(step, 7))
    assert time.monotonic() - started < 10
    with pytest.raises(RuntimeError, match="closed"):
        s.get(0, 0)
    assert not any(process.is_alive() for process in s._loader._processes)


def loader_of(reader: ImageReader, kind: type[ImageReader]) -> Loader:
    reader.__class__ = kind
    return Loader(reader, 1, 2, 5)


def test_other_errors_are_raised_in_the_rank(manifest: Manifest) -> None:
    loader = loader_of(open_reader(manifest, ReaderSpec(shards=manifest.path), 8, 3), Failing)
    request = Locator(manifest).request(np.arange(5), np.arange(5))
    for _ in range(4):  # more often than there are slots
        with pytest.raises(DatasetError, match="the disk is full") as caught:
            next(loader.run([request] * 3))
    assert "in a reading process:" in caught.value.__notes__[0] and "in read" in caught.value.__notes__[0]
    loader.close()


def test_closing_does_not_wait_for_a_request(manifest: Manifest, tmp_path: Path) -> None:
    reader = open_reader(manifest, ReaderSpec(shards=manifest.path), 8, 3)
    loader = loader_of(reader, Stuck)
    reader.begun = tmp_path / "begun"  # type: ignore[attr-defined]
    request = Locator(manifest).request(np.arange(5), np.arange(5))
    assert loader._ring is not None
    loader._start(loader._ring)
    loader._top_up(loader._ring, iter([request]))
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 4
    assert not any(process.is_alive() for process in loader._processes)


def test_a_loader_that_is_forgotten_ends_its_processes(manifest: Manifest) -> None:
    s = stream(manifest, 1)
    s.get(0, 0)
    (process,) = s._loader._processes
    del s
    gc.collect()
    process.join(10)
    assert not process.is_alive()


def test_memory_does_not_grow_with_batches(manifest: Manifest, two: Stream) -> None:
    """Slots come back: their number is fixed."""
    for step in range(70):
        two.get(*divmod(step, 7))
    ring = two._loader._ring
    assert ring is not None
    held = len(two._loader._pending)
    assert len(ring._free) + ring._lent + held == 2 * 2 + LENT and ring._lent <= 1


def test_a_ring_lends_no_more_than_it_may(tmp_path: Path) -> None:
    ring = Ring(2, 4, 3, 1)
    held = []
    for i in range(20):
        slot = ring.claim()
        ring.images(slot, 4).fill_(i)
        held.append(ring.lend(slot, 2 + i % 3, False))
    assert ring._lent == LENT
    for i, images in enumerate(held):
        assert images.shape == (2 + i % 3, 1, 3, 3) and (images == i).all()
    part = held[0][1:]
    del held, images
    assert ring._lent == 1 and (part == 0).all()
    del part
    assert sorted(ring._free) == list(range(2 + LENT))
