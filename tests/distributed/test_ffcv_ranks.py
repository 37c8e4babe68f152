"""Compiled files on real gloo ranks: runs that stop and go on with other ranks end where a run on the tars ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch.distributed as dist

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled.write import compile_shards
from dfkd_dist.data.stream.sets import open_set
from dfkd_dist.data.stream.stream import Stream
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.stopping import EXIT_STOPPED
from tests import recipes
from tests.distributed import running
from tests.distributed.harness import run_ranks
from tests.distributed.running import Leg, Tree
from tests.shards import encoded, small_pictures, write_shards

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.real,
    pytest.mark.slow,  # every rank imports FFCV, and compiles
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("ffcv") is None,
        reason="the extra ffcv is not installed; scripts/install_ffcv.sh says what it needs",
    ),
]

BATCH, STEPS, CLOSE, LONG_S = 6, 15, 1e-9, 400.0
Batches = list[tuple[list[int], list[bool], int]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 images in 5 unequal shards; two of them are not images."""
    images: list[bytes] = [encoded(image, "png") for image in small_pictures(43)]
    images[3] = images[22] = b"no image"
    return write_shards(tmp_path_factory.mktemp("shards") / "set", images)


@pytest.fixture(scope="module")
def compiled(shards: Path) -> Path:
    return compile_shards(str(shards), shards.with_name("set.beton"), 8, 3, bad_limit=1.0).path


def reader(where: Path) -> ReaderSpec:
    kind = "ffcv" if where.suffix == ".beton" else "tar"
    return ReaderSpec(shards=str(where), kind=kind, workers=0, window=13, bad_limit=1.0)


def _batches(rank: int, size: int, where: Path, start: int, stop: int) -> Batches:
    """Ids, validity and sum of pixels of global batches, put together from all ranks."""
    group = Group(tuple(range(size)), rank, dist.group.WORLD)
    options = {"batch": BATCH, "size": 8, "channels": 3, "seed": 3}
    stream = Stream(open_set(reader(where)), reader(where), **options, rank=rank, world_size=size)
    seen: Batches = []
    for step in range(start, stop):
        raw = stream.get(*divmod(step, stream.batches))
        mine = (raw.ids_N.tolist(), raw.valid_N.tolist(), int(raw.images_NCHW.long().sum()))
        ids, valid, pixels = zip(*group.gather_objects(mine), strict=True)
        seen.append((sum(ids, []), sum(valid, []), sum(pixels)))
    return seen


def test_one_order_on_any_number_of_ranks(shards: Path, compiled: Path) -> None:
    """Begun on two ranks, gone on with on one; beside the tars on one."""
    (tars,) = run_ranks(_batches, 1, shards, 0, STEPS)
    first = run_ranks(_batches, 2, compiled, 0, STEPS - 5, timeout=LONG_S)
    (rest,) = run_ranks(_batches, 1, compiled, STEPS - 5, STEPS, timeout=LONG_S)
    assert first[0] == first[1] and first[0] + rest == tars


def game(where: Path, teachers: list[Tree], folder: Path) -> Tree:
    """KD3: every round looks at the whole set, selects, and trains on what was selected."""
    objective = {"kind": "kd3", "head": 6, "mdcl": 0.1, "delta": 0.5}
    tree = recipes.base(
        teachers, rounds={"warmup": 0, "main": 3, "student_steps": "epoch"}, objective=objective, out=str(folder)
    )
    selection = {"kind": "kd3", "threshold": 0.1, "batch": 4}
    tree["source"] = {"kind": "stream", "reader": reader(where).model_dump(), "selection": selection}
    precision = {"train": "fp64", "teacher": "fp64"}
    return tree | {"log": {"grids": False}, "checkpoint": {"every": 0, "keep": 50}, "precision": precision}


def test_a_run_ends_where_it_would_on_tars(shards: Path, compiled: Path, tmp_path: Path) -> None:
    teachers = recipes.write_teachers(tmp_path / "teachers", 1)
    whole = game(shards, teachers, tmp_path / "tars")
    assert run_ranks(running.travel, 1, [Leg(whole)]) == [[0]]
    parts = game(compiled, teachers, tmp_path / "ffcv")
    legs = [Leg(parts, stop) for stop in (2, 5)]
    assert run_ranks(running.travel, 2, legs, timeout=LONG_S) == [[EXIT_STOPPED] * 2] * 2
    assert run_ranks(running.travel, 1, [Leg(parts)], timeout=LONG_S) == [[0]]
    found = running.differences(running.state(tmp_path / "tars"), running.state(tmp_path / "ffcv"))
    assert {place: value for place, value in found.items() if not (value < CLOSE or place.startswith("/meters"))} == {}
