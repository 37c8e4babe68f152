"""Global batches: the same on any number of ranks, from any point on; bad samples keep their slots and are listed."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.decode import decode_one
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.order import subset
from dfkd_dist.data.stream.stream import Chunk, Quarantine, RawBatch, Stream, chunks_of, scan
from tests.encoded import bad_files, picture, save
from tests.shards import write_shards

BATCH = 6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """5 unequal shards, 43 samples."""
    return read_manifest(write_shards(tmp_path_factory.mktemp("shards"), 43))


def stream(manifest: Manifest, rank: int = 0, world_size: int = 1, **keys: Any) -> Stream:
    spec: dict[str, Any] = {"workers": 0, "window": 10, "bad_limit": 1.0}
    spec.update({key: keys.pop(key) for key in list(keys) if key in ReaderSpec.model_fields})
    reader = ReaderSpec(shards=manifest.path, **spec)
    options: dict[str, Any] = {"batch": BATCH, "size": 8, "channels": 3, "seed": 1, **keys}
    return Stream(manifest, reader, rank=rank, world_size=world_size, **options)


def global_batch(streams: list[Stream], epoch: int, g: int) -> dict[str, torch.Tensor]:
    """What all ranks have, in the order of slots."""
    parts = [s.get(epoch, g) for s in streams]
    slots = torch.cat([part.slots_N for part in parts])
    assert slots.tolist() == list(range(BATCH))
    names = ("images_NCHW", "valid_N", "ids_N", "labels_N")
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def epoch_of(s: Stream, epoch: int) -> list[int]:
    return [i for g in range(s.batches) for i in s.get(epoch, g).ids_N.tolist()]


# --------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_ranks(manifest: Manifest, world_size: int) -> None:
    alone = [stream(manifest)]
    ranks = [stream(manifest, rank, world_size) for rank in range(world_size)]
    assert {s.batches for s in ranks} == {7}
    for epoch in (0, 1):
        for g in range(7):
            one, many = global_batch(alone, epoch, g), global_batch(ranks, epoch, g)
            assert all(torch.equal(one[name], many[name]) for name in one)


def test_an_epoch_has_every_sample_once_but_for_the_tail(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        s = stream(manifest)
    assert "1 of 43 samples do not fill a batch of 6" in caplog.text
    first, second = epoch_of(s, 0), epoch_of(s, 1)
    assert len(set(first)) == 42 and len(set(second)) == 42
    assert first != second and first != sorted(first)


def test_images_and_labels_are_those_of_their_samples(manifest: Manifest) -> None:
    raw = stream(manifest).get(0, 3)
    for image, i, label in zip(raw.images_NCHW, raw.ids_N.tolist(), raw.labels_N.tolist(), strict=True):
        shard = int(manifest.where(np.array([i]))[0][0])
        data = np.fromfile(manifest.location(shard), dtype=np.uint8)
        encoded = data[manifest.offsets_N[i] : manifest.offsets_N[i] + manifest.sizes_N[i]]
        assert torch.equal(image, decode_one(encoded, size=8, channels=3))
        assert label == manifest.labels_N[i] == i % 5
    assert raw.valid_N.all() and not raw.bad


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_run_goes_on_where_it_stopped(manifest: Manifest, stop: int, world_size: int) -> None:
    """The cursor is a count of batches; the number of ranks may change."""
    whole = stream(manifest)
    ids = [whole.get(*divmod(step, 7)).ids_N.tolist() for step in range(14)]
    resumed = [stream(manifest, rank, world_size) for rank in range(world_size)]
    rest = [sum((s.get(*divmod(step, 7)).ids_N.tolist() for s in resumed), []) for step in range(stop, 14)]
    assert ids[:stop] + rest == ids


def test_any_batch_at_any_time(manifest: Manifest) -> None:
    s, other = stream(manifest), stream(manifest)
    expected = {(e, g): s.get(e, g).ids_N.tolist() for e in range(3) for g in range(7)}
    for epoch, g in [(2, 6), (0, 0), (0, 0), (1, 3), (1, 4), (0, 6), (1, 0)]:
        assert other.get(epoch, g).ids_N.tolist() == expected[epoch, g]


def test_more_ranks_than_slots(manifest: Manifest) -> None:
    raw = [stream(manifest, rank, 8, batch=3).get(0, 0) for rank in range(8)]
    assert sorted(len(part.ids_N) for part in raw) == [0] * 5 + [1] * 3
    assert all(part.images_NCHW.shape[1:] == (3, 8, 8) for part in raw)


def test_without_shuffling_the_order_is_that_of_the_set(manifest: Manifest) -> None:
    s = stream(manifest, shuffle=False)
    assert epoch_of(s, 0) == epoch_of(s, 1) == list(range(42))
    s.choose(np.arange(43) % 2 == 1)
    assert epoch_of(s, 0) == list(range(1, 36, 2))


# --------------------------------------------------------------------------------------------------- the choice


def test_fractions_are_nested_and_the_same_on_any_number_of_ranks(manifest: Manifest) -> None:
    part = set(np.flatnonzero(subset(43, 0.6, 1)).tolist())
    assert set(np.flatnonzero(subset(43, 0.3, 1)).tolist()) < part
    ranks = [stream(manifest, rank, 2, fraction=0.6) for rank in range(2)]
    seen = [i for g in range(ranks[0].batches) for i in global_batch(ranks, 0, g)["ids_N"].tolist()]
    assert len(seen) == len(part) // BATCH * BATCH and set(seen) <= part


def test_a_choice_replaces_the_one_before(manifest: Manifest) -> None:
    s = stream(manifest, fraction=0.8)
    before = epoch_of(s, 0)
    chosen = np.arange(43) < 30
    s.get(0, 0)
    s.choose(chosen)
    allowed = set(np.flatnonzero(chosen & subset(43, 0.8, 1)).tolist())
    assert s.batches == len(allowed) // BATCH
    assert set(epoch_of(s, 0)) <= allowed
    s.choose(None)
    assert epoch_of(s, 0) == before


def test_a_choice_too_small_for_a_batch_leaves_none(manifest: Manifest) -> None:
    s = stream(manifest)
    s.choose(np.arange(43) < 5)
    assert s.batches == 0
    with pytest.raises(ValueError, match="epoch 0, batch 0: epochs have 0 batches"):
        s.get(0, 0)


@pytest.mark.parametrize("mask", [np.ones(42, dtype=np.bool_), np.ones(43), np.ones((43, 1), dtype=np.bool_)])
def test_a_choice_must_fit(manifest: Manifest, mask: Any) -> None:
    with pytest.raises(ValueError, match=r"chosen_N: found .*; expected bool \(43,\)"):
        stream(manifest).choose(mask)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch": 44}, "43 of the 43 samples take part .* fewer than one batch of 44"),
        ({"fraction": 0.01}, "of the 43 samples take part .reader.fraction 0.01., fewer than one batch of 6"),
        ({"rank": 2, "world_size": 2}, "rank: found 2, allowed are 0 to 1"),
        ({"channels": 4}, "channels: found 4, allowed are 1 and 3"),
    ],
)
def test_what_cannot_work_is_refused_at_once(manifest: Manifest, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(manifest, **keys)


@pytest.mark.parametrize(("epoch", "g"), [(0, 7), (0, -1), (-1, 0)])
def test_batches_that_are_not_there(manifest: Manifest, epoch: int, g: int) -> None:
    with pytest.raises(ValueError, match="epochs have 7 batches of 6"):
        stream(manifest).get(epoch, g)


def test_a_closed_stream_says_so(manifest: Manifest) -> None:
    s = stream(manifest)
    s.get(0, 0)
    s.close()
    s.close()
    with pytest.raises(RuntimeError, match="closed"):
        s.get(0, 1)


def test_amplification_is_reported(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    s = stream(manifest)
    epoch_of(s, 0)
    assert s.traffic.used == sum(manifest.sizes_N[i] for i in epoch_of(stream(manifest), 0))
    assert s.traffic.amplification == s.traffic.read / s.traffic.used >= 1
    with caplog.at_level(logging.INFO):
        s.close()
    assert "amplification" in caplog.text


# ------------------------------------------------------------------------------------------------------ scanning


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_a_scan_has_every_sample_exactly_once(manifest: Manifest, batch: int) -> None:
    chunks = chunks_of(manifest, batch)
    reader = ReaderSpec(shards=manifest.path, workers=0, fraction=0.5)
    seen = list(scan(manifest, reader, batch=batch, size=8, channels=1, chunks=chunks))
    assert [i for raw in seen for i in raw.ids_N.tolist()] == list(range(43))
    assert all(raw.slots_N.tolist() == list(range(len(raw.ids_N))) for raw in seen)
    shards = [set(manifest.where(raw.ids_N.numpy())[0].tolist()) for raw in seen]
    assert all(len(shard) == 1 for shard in shards)
    assert [raw.images_NCHW.shape for raw in seen] == [(chunk.count, 1, 8, 8) for chunk in chunks]


def test_some_chunks_in_any_order(manifest: Manifest) -> None:
    reader = ReaderSpec(shards=manifest.path, workers=0)
    chunks = [Chunk(40, 2), Chunk(0, 3), Chunk(8, 1)]
    seen = scan(manifest, reader, batch=3, size=8, channels=3, chunks=chunks)
    assert [raw.ids_N.tolist() for raw in seen] == [[40, 41], [0, 1, 2], [8]]
    assert list(scan(manifest, reader, batch=3, size=8, channels=3, chunks=[])) == []


@pytest.mark.parametrize("chunk", [Chunk(-1, 2), Chunk(42, 2), Chunk(0, 4), Chunk(0, 0)])
def test_chunks_outside_are_refused(manifest: Manifest, chunk: Chunk) -> None:
    with pytest.raises(ValueError, match="chunks: Chunk.*allowed are 1 to 3 of the 43 samples"):
        list(scan(manifest, ReaderSpec(shards=manifest.path, workers=0), batch=3, size=8, channels=3, chunks=[chunk]))


# --------------------------------------------------------------------------------------------------- bad samples


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    """40 good and 20 bad samples, and a shard that was cut."""
    bad = [data for _, data in bad_files().values()]
    files = [save(picture(8, 8, seed=i), "JPEG") for i in range(40)]
    manifest = read_manifest(write_shards(tmp_path / "set", files[:20] + bad + files[20:], per_shard=15))
    os.truncate(tmp_path / "set" / "000003.tar", int(manifest.offsets_N[-2]) + 5)
    return manifest


def causes(manifest: Manifest) -> dict[int, str]:
    """Ids of the bad samples of `damaged`."""
    bad = {20 + i: cause for i, (cause, _) in enumerate(bad_files().values())}
    return {**bad, len(manifest) - 2: "truncated", len(manifest) - 1: "truncated"}


def test_bad_samples_keep_their_slots(damaged: Manifest) -> None:
    reader = ReaderSpec(shards=damaged.path, workers=0, bad_limit=1.0)
    expected = causes(damaged)
    for raw in scan(damaged, reader, batch=7, size=8, channels=3, chunks=chunks_of(damaged, 7)):
        bad = [i in expected for i in raw.ids_N.tolist()]
        assert raw.valid_N.tolist() == [not is_bad for is_bad in bad]
        assert not raw.images_NCHW[~raw.valid_N].any()
        assert raw.images_NCHW[raw.valid_N].flatten(1).any(dim=1).all()
        for sample in raw.bad:
            assert sample.cause == expected[sample.id] and sample.detail
            shard, index = (int(n[0]) for n in damaged.where(np.array([sample.id])))
            assert (sample.shard, sample.index) == (damaged.shards[shard].name, index)


def test_bad_samples_are_listed_once_in_a_run(damaged: Manifest, tmp_path: Path) -> None:
    expected = causes(damaged)

    def run(epochs: Iterator[int], batch: int, world_size: int) -> list[Quarantine]:
        lists = [Quarantine(tmp_path / "run", rank) for rank in range(world_size)]
        ranks = [stream(damaged, rank, world_size, batch=batch, quarantine=lists[rank]) for rank in range(world_size)]
        for epoch in epochs:
            for g in range(ranks[0].batches):
                for s in ranks:
                    s.get(epoch, g)
        return lists

    first = run(iter(range(2)), 60, 2)
    resumed = run(iter(range(2)), 4, 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["cause"] for line in lines} == expected
    assert len(lines) == len(expected)
    assert set(lines[0]) == {"id", "shard", "index", "cause", "detail", "rank"} and {
        line["rank"] for line in lines
    } <= {0, 1, 2}
    assert sum(sum(q.counts.values()) for q in first) >= len(expected)
    assert sum(resumed[0].counts.values()) == len(expected)
    assert resumed[0].counts["corrupt"] == sum(cause == "corrupt" for cause in expected.values())


def test_too_many_bad_samples_stop_the_run(damaged: Manifest, tmp_path: Path) -> None:
    s = stream(damaged, quarantine=Quarantine(tmp_path), bad_limit=0.2, batch=20)
    for step in range(4):
        s.get(*divmod(step, 3))  # below a hundred nothing is concluded
    message = r"\d+ of 100 samples \(\d+\.\d%\) could not be used \(corrupt \d+, .*allowed by reader.bad_limit: 20.0%"
    with pytest.raises(DatasetError, match=message + ".*quarantine.jsonl"):
        s.get(1, 1)


def test_a_scan_has_the_same_limit(damaged: Manifest) -> None:
    reader = ReaderSpec(shards=damaged.path, workers=0, bad_limit=0.2)
    chunks = chunks_of(damaged, 15) * 2
    seen: list[RawBatch] = []
    with pytest.raises(DatasetError, match=r"of 105 samples .*not_an_image \d"):
        seen.extend(scan(damaged, reader, batch=15, size=8, channels=3, chunks=chunks))
