"""Pieces of local shards: few reads for many samples, and damage that costs the damaged samples only."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream import stores
from dfkd_dist.data.stream.batch import Outcome, Unusable
from dfkd_dist.data.stream.locating import Locator
from dfkd_dist.data.stream.opening import open_reader
from dfkd_dist.data.stream.reading import plan
from dfkd_dist.data.stream.stores import LocalStore, Place, Span
from tests.shards import write_shards


def read_all(manifest: Manifest, ids: list[int] | None = None) -> Outcome:
    reader = open_reader(manifest, ReaderSpec(shards=manifest.path), 8, 3)
    wanted = np.arange(len(manifest)) if ids is None else np.array(ids)
    return reader.read(Locator(manifest).request(wanted, np.arange(len(wanted))).pieces_3N)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(0, 50),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_covers_every_sample_with_few_pieces(pieces: list[tuple[int, int, int]], gap: int) -> None:
    pieces.sort()
    shards, offsets, sizes = (np.array(column) for column in zip(*pieces, strict=True))
    spans, span_n, starts = plan(shards, offsets, sizes, gap)
    for (shard, offset, size), number, start in zip(pieces, span_n, starts, strict=True):
        span = spans[number]
        assert span.shard == shard and span.offset <= offset and offset + size <= span.offset + span.size
        assert start == span.at + offset - span.offset
    ends = [span.at + span.size for span in spans]
    assert [span.at for span in spans] == [0, *ends[:-1]]
    for one, next_one in zip(spans, spans[1:], strict=False):
        # Between two pieces of one shard lies more than the gap, seen from the sample in front of it.
        assert one.shard != next_one.shard or next_one.offset > min(one.offset + s for s in sizes)


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(write_shards(tmp_path, 43))
    reads: list[int] = []
    real = stores.read_fully
    monkeypatch.setattr(stores, "read_fully", lambda file, target, at: reads.append(at) or real(file, target, at))
    outcome = read_all(manifest)
    assert not outcome.failures and len(reads) == len(manifest.shards)
    assert sum(manifest.sizes_N) <= outcome.bytes_read <= sum(shard.bytes for shard in manifest.shards)


def test_any_ids_in_any_order_also_twice(tmp_path: Path) -> None:
    manifest = read_manifest(write_shards(tmp_path, 43))
    whole = read_all(manifest).images_NCHW
    ids = [42, 0, 17, 17, 3, 42]
    assert (read_all(manifest, ids).images_NCHW == whole[ids]).all()


def test_memory_is_bounded_by_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(write_shards(tmp_path, 43))
    whole = read_all(manifest).images_NCHW
    monkeypatch.setattr("dfkd_dist.data.stream.reading._AT_ONCE", 1500)
    reader = open_reader(manifest, ReaderSpec(shards=manifest.path), 8, 3)
    request = Locator(manifest).request(np.arange(43), np.arange(43))
    assert (reader.read(request.pieces_3N).images_NCHW == whole).all()
    assert len(reader._buffer) < 10_000


def test_a_truncated_shard_loses_what_was_cut(tmp_path: Path) -> None:
    manifest = read_manifest(write_shards(tmp_path, 43))
    shard = tmp_path / "000001.tar"
    cut = int(manifest.offsets_N[7 + 5]) + 10
    os.truncate(shard, cut)
    outcome = read_all(manifest)
    assert [(f.position, f.cause) for f in outcome.failures] == [(i, "truncated") for i in range(12, 19)]
    assert str(cut) in outcome.failures[0].detail
    assert outcome.images_NCHW[:12].any(dim=(1, 2, 3)).all() and not outcome.images_NCHW[12:19].any()


def test_a_missing_shard_loses_its_samples(tmp_path: Path) -> None:
    manifest = read_manifest(write_shards(tmp_path, 43))
    (tmp_path / "000002.tar").unlink()
    outcome = read_all(manifest)
    assert [(f.position, f.cause) for f in outcome.failures] == [(i, "missing") for i in range(19, 24)]
    assert "000002.tar" in outcome.failures[0].detail


def test_few_files_are_open_and_a_copy_opens_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_OPEN_FILES", 3)
    places = []
    for k in range(10):
        (tmp_path / f"{k}").write_bytes(bytes([k]) * 100)
        places.append(Place(str(tmp_path / f"{k}"), 100, ""))
    before = len(os.listdir("/proc/self/fd"))
    store = LocalStore(places)
    buffer = np.zeros(1000, dtype=np.uint8)
    assert store.read([Span(k, 0, 100, 100 * k) for k in range(10)], buffer) == [100] * 10
    assert (buffer == np.repeat(np.arange(10), 100)).all()
    assert len(os.listdir("/proc/self/fd")) == before + 3
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read([Span(9, 90, 20, 0)], buffer) == [10]
    del copy, store
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stale_handle_is_opened_anew(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(100))
    store = LocalStore([Place(str(tmp_path / "shard"), 100, "")])
    buffer = np.zeros(100, dtype=np.uint8)
    store.read([Span(0, 0, 10, 0)], buffer)
    os.close(store._files[0])  # reading from it fails from now on
    assert store.read([Span(0, 50, 60, 0)], buffer) == [50]


def test_a_directory_in_the_place_of_a_shard_is_missing(tmp_path: Path) -> None:
    (result,) = LocalStore([Place(str(tmp_path), 10, "")]).read([Span(0, 0, 10, 0)], np.zeros(10, dtype=np.uint8))
    assert isinstance(result, Unusable) and result.cause == "missing"


@pytest.mark.parametrize(("offset", "size"), [(10**6, 10), (0, 10**9), (2**62, 2**62), (100, 2**63 - 50)])
def test_bytes_outside_a_shard_are_refused(tmp_path: Path, offset: int, size: int) -> None:
    manifest = read_manifest(write_shards(tmp_path, 10))
    manifest.offsets_N[8], manifest.sizes_N[8] = offset, size
    with pytest.raises(DatasetError, match="sample 8 .* its shard 000001.tar has"):
        open_reader(manifest, ReaderSpec(shards=str(tmp_path)), 8, 3)
