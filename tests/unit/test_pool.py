"""The pool: what was put in comes out, from memory and from shards, after any stop; and whose folder it may use."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dfkd_dist.data import pool as pools
from dfkd_dist.data import pool_shards
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pool import Made, Pool
from dfkd_dist.data.pool_memory import Recent
from dfkd_dist.data.pool_shards import OWNER, TARGETS, PoolShards
from dfkd_dist.data.shards.manifest import MANIFEST, read_manifest
from dfkd_dist.data.shards.verify import verify

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]
SHARD, ROUND, CAPACITY = 4, 6, 10


def make_pool(folder: Path | None, capacity: int = CAPACITY, channels: int = 3, **owner: Any) -> Pool:
    shards = None if folder is None else PoolShards(folder, SHARD, CLASSES, {"name": "test", "seed": 0, **owner})
    return Pool(channels, 5, capacity, CPU, shards)


def made(round: int, channels: int = 3, logits: bool = True) -> Made:
    """A round's images: a function of its number."""
    g = torch.Generator().manual_seed(round)
    images_NCHW = torch.randint(0, 256, (ROUND, channels, 5, 5), generator=g, dtype=torch.uint8)
    said = torch.randn(ROUND, 2, 3, generator=g, dtype=torch.float64) if logits else None
    return Made(images_NCHW, torch.arange(ROUND) % 3, torch.arange(ROUND) // 3, said)


def everything(rounds: range, **how: Any) -> dict[str, Tensor]:
    parts = [vars(made(round, **how)) for round in rounds]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if parts[0][name] is not None}


def play(pool: Pool, rounds: range, **how: Any) -> None:
    for round in rounds:
        pool.add(made(round, **how))
        if pool.full_shards:
            pool.take_up(pool.write())


def assert_holds(pool: Pool, rounds: range, **how: Any) -> None:
    expected = everything(rounds, **how)
    assert len(pool) == len(expected["labels_N"])
    ids_n = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1)).repeat(2)
    found = vars(pool.read(ids_n))
    assert {name for name, value in found.items() if value is not None} == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value[ids_n]), name
        assert found[name].dtype == value.dtype


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------- contents


def test_recent_keeps_the_newest() -> None:
    rows = Recent(5, (2,), torch.int64, CPU)
    for start in range(0, 12, 3):
        rows.append(torch.arange(start, start + 3).unsqueeze(1).expand(3, 2))
    assert (rows.start, rows.end) == (7, 12)
    assert rows.take(torch.tensor([11, 7, 9]))[:, 0].tolist() == [11, 7, 9]
    with pytest.raises(ValueError, match="6 rows at once, but only 5"):
        rows.append(torch.zeros(6, 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("logits", [True, False])
def test_what_was_put_in_comes_out(channels: int, logits: bool, tmp_path: Path) -> None:
    how = {"channels": channels, "logits": logits}
    in_memory, spilled = make_pool(None, 100, channels), make_pool(tmp_path / "pool", channels=channels)
    for pool in (in_memory, spilled):
        play(pool, range(5), **how)
        assert_holds(pool, range(5), **how)
    assert in_memory.in_memory and not spilled.in_memory
    assert len(files(tmp_path / "pool")) == 7 * 2 + 2


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    pool, expected = make_pool(tmp_path), everything(range(5))
    play(pool, range(5))
    for ids, ahead in (([0, 1, 29], [2, 3, 0]), ([2, 3, 0], [5, 28]), ([7], [1])):  # the last was not announced
        pool.will_read(torch.tensor(ahead))
        found = pool.read(torch.tensor(ids))
        assert torch.equal(found.images_NCHW, expected["images_NCHW"][ids])
    pool.close()
    assert torch.equal(pool.read(torch.tensor([4])).images_NCHW, expected["images_NCHW"][[4]])


def test_another_rank_reads_what_one_wrote(tmp_path: Path) -> None:
    writer, reader = make_pool(tmp_path), make_pool(tmp_path)
    for round in range(5):
        for pool in (writer, reader):
            pool.add(made(round))
        pieces = writer.write()
        writer.take_up(pieces)
        reader.take_up(pieces)
    assert_holds(reader, range(5))


def test_its_folder_is_a_set_of_shards(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    for rounds in (range(1), range(1, 5)):
        play(pool, rounds)
        report = verify(tmp_path)
        assert not report.findings and not report.unlisted
    manifest = read_manifest(tmp_path)
    assert manifest.classes == tuple(CLASSES) and len(manifest) == 28
    assert manifest.labels_N.tolist() == everything(range(5))["labels_N"][:28].tolist()


def test_there_must_be_room_for_what_is_on_no_disk(tmp_path: Path) -> None:
    alone = make_pool(None, 10)
    alone.add(made(0))
    with pytest.raises(ValueError, match="12 images are in no shard yet, but only 10 fit"):
        alone.add(made(1))


# ------------------------------------------------------------------------------------------------- state


def _saved(state: Any) -> Any:
    """As a checkpoint would give it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_a_state_gives_the_pool_back(rounds: int, tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(rounds))
    again = make_pool(tmp_path)
    again.load_state_dict(_saved(pool.state_dict()))
    if rounds:
        assert_holds(again, range(rounds))
    play(again, range(rounds, rounds + 3))
    assert_holds(again, range(rounds + 3))
    assert not verify(tmp_path).findings


def test_a_state_holds_less_than_a_shard(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    sizes = []
    for round in range(20):
        play(pool, range(round, round + 1))
        state = pool.state_dict()
        assert len(state["images"]) < SHARD
        assert [entry["count"] for entry in state["shards"]] == [SHARD] * len(state["shards"])
        sizes.append(len(json.dumps(state["shards"])))
    assert sizes[-1] < 300 * len(state["shards"])


def test_putting_a_state_back_reads_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever only evaluates a run needs none."""
    pool = make_pool(tmp_path)
    play(pool, range(5))
    again = make_pool(tmp_path)
    monkeypatch.setattr(PoolShards, "read", lambda *_: pytest.fail("images were read"))
    again.load_state_dict(pool.state_dict())
    assert len(again) == 30


def test_what_no_state_knows_of_is_made_again(tmp_path: Path) -> None:
    """A kill after shards were written, before a checkpoint: the same rounds leave the same files."""
    whole, folder = make_pool(tmp_path / "whole"), tmp_path / "pool"
    play(whole, range(5))
    pool = make_pool(folder)
    play(pool, range(2))
    state = _saved(pool.state_dict())
    before = files(folder)
    play(pool, range(2, 5))  # lost
    (folder / ".000003.tar.99.part").write_bytes(b"cut")
    assert {name: files(folder)[name] for name in before if name != MANIFEST} == {
        name: content for name, content in before.items() if name != MANIFEST
    }
    again = make_pool(folder)
    again.load_state_dict(state)
    assert_holds(again, range(2))
    play(again, range(2, 4))
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"{n:06d}.tar" for n in range(6)]
    assert not verify(folder).unlisted
    play(again, range(4, 5))
    assert_holds(again, range(5))
    assert files(folder) == files(tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(3))
    expected = files(tmp_path)
    play(pool, range(3, 6))
    again = make_pool(tmp_path)
    play(again, range(3))
    assert files(tmp_path) == expected
    assert_holds(again, range(3))


@pytest.mark.parametrize("at", ["_save_facts", "write_shard", "write_manifest"])
def test_a_kill_while_a_shard_is_written(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(2))
    state, before = _saved(pool.state_dict()), files(tmp_path)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pool_shards, at, killed)
        play(pool, range(2, 3))
    found = files(tmp_path)
    assert {name: found[name] for name in before} == before
    again = make_pool(tmp_path)
    again.load_state_dict(state)
    play(again, range(2, 5))
    assert_holds(again, range(5))
    assert not verify(tmp_path).findings


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["000001.tar", "000001.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_part_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(2))
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-300] ^= 1
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{name}: .*{damage}"):
        make_pool(tmp_path).load_state_dict(pool.state_dict())


def test_an_image_that_was_altered_while_running_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(5))
    path = tmp_path / "000000.tar"
    content = bytearray(path.read_bytes())
    content[read_manifest(tmp_path).offsets_N[1] + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"000000.tar: image 000000001 was altered"):
        pool.read(torch.tensor([1]))


def test_a_manifest_of_other_shards_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(2))
    state = _saved(pool.state_dict())
    state["shards"][1]["sha256"] = "0" * 64
    with pytest.raises(DatasetError, match=r"manifest.json: does not list shard 000001.tar"):
        make_pool(tmp_path).load_state_dict(state)


def test_a_folder_of_other_shards_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes(b"mine")
    with pytest.raises(DatasetError, match="no pool's"):
        play(make_pool(tmp_path), range(1))
    assert files(tmp_path) == {"000000.tar": b"mine"}


def test_the_pool_of_another_run_is_left_alone(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(2))
    before = files(tmp_path)
    with pytest.raises(DatasetError, match="is the pool of .*'seed': 0.*, not of .*'seed': 1"):
        play(make_pool(tmp_path, seed=1), range(1))
    with pytest.raises(DatasetError, match="choose another folder"):
        make_pool(tmp_path, seed=1).load_state_dict(pool.state_dict())
    assert files(tmp_path) == before


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool_shards, "write_shard", full)
    with pytest.raises(DatasetError, match=f"{tmp_path}: the pool cannot be written: .*No space left"):
        play(make_pool(tmp_path), range(1))


# ----------------------------------------------------------------------------------------------- finished


def test_a_finished_pool(tmp_path: Path) -> None:
    pool = make_pool(tmp_path)
    play(pool, range(5))
    manifest = pool.finish()
    pool.seal()
    assert len(manifest) == 30 and [shard.count for shard in manifest.shards] == [4] * 7 + [2]
    assert not verify(tmp_path).findings
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".tar"} == {MANIFEST, OWNER, TARGETS}
    expected = everything(range(5))
    with safe_open(tmp_path / TARGETS, "pt") as facts:
        assert facts.metadata() == {"manifest": manifest.digest}
        assert set(facts.keys()) == {"labels_N", "teachers_N", "logits_NKC"}
        for name in facts.keys():  # noqa: SIM118  (it is no dictionary)
            assert torch.equal(facts.get_tensor(name), expected[name])


def test_an_empty_pool_cannot_be_finished(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="without images"):
        make_pool(tmp_path).finish()
    assert pools.Made(*[torch.zeros(0)] * 3).facts().keys() == {"labels_N", "teachers_N"}
