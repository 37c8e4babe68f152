"""Sets of shards as collections: every sample once, selections and what they leave, a run's own stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_dist.config import ReaderSpec, Recipe, parse
from dfkd_dist.data.datasets import DatasetError
from dfkd_dist.data.selection import Chosen, SelectionWriter
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.order import subset
from dfkd_dist.data.stream.scan import scan
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.measures import Measuring, Wanted
from dfkd_dist.engine.look.named import Finder
from dfkd_dist.engine.look.shards import ShardCollection, chunks_of_ids
from tests.looks import CPU
from tests.recipes import NAMES, base, dfmf, write_teachers
from tests.shards import PER_SHARD, write_shards
from tests.voters import speak_up

COUNT = sum(PER_SHARD)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "set", suffix="png")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return write_teachers(tmp_path_factory.mktemp("teachers"), 2)


def reader(where: Path, **keys: object) -> ReaderSpec:
    return parse(ReaderSpec, {"shards": str(where), "workers": 0} | keys)


def collection(where: Path, ids: list[int] | None = None) -> ShardCollection:
    ids_N = None if ids is None else torch.tensor(ids)
    return ShardCollection(read_manifest(where), reader(where), 8, 3, "set", ids_N)


def numbers(found: Collection, batch: int = 8) -> list[int]:
    return [n for seen in found.batches(batch) for n in seen.numbers_N.tolist()]


def select(path: Path, manifest: Manifest, ids: list[int]) -> Path:
    """A file as `dfkd select` writes it."""
    with SelectionWriter(path, manifest, len(ids), {}, []) as writer:
        for number, shard in enumerate(manifest.shards):
            mine = [i - shard.start for i in ids if 0 <= i - shard.start < shard.count]
            writer.add(number, manifest.keys(number), Chosen(np.array(mine, dtype=np.int64)))
    return path


@pytest.mark.parametrize("batch", [1, 6, 100])
def test_every_sample_is_seen_once_in_order(shards: Path, batch: int) -> None:
    found = collection(shards)
    seen = list(found.batches(batch))
    assert [n for one in seen for n in one.numbers_N.tolist()] == list(range(COUNT)) and len(found) == COUNT
    assert [len(one.numbers_N) for one in seen[:-1]] == [batch] * (len(seen) - 1)  # batches go across shards
    labels = [one.labels_N for one in seen if one.labels_N is not None]
    assert torch.cat(labels).tolist() == [i % 5 for i in range(COUNT)] and found.classes == tuple("01234")
    raw = scan(found.manifest, found.reader, batch=COUNT, size=8, channels=3, chunks=chunks_of_ids(
        found.manifest, torch.arange(COUNT), COUNT
    ))  # fmt: skip
    assert torch.equal(torch.cat([one.images_NCHW for one in seen]), torch.cat([one.images_NCHW for one in raw]))


def test_chunks_are_runs_within_a_shard_and_a_batch(shards: Path) -> None:
    manifest = read_manifest(shards)  # shards begin at 0, 7, 19, 24 and 33
    found = chunks_of_ids(manifest, torch.tensor([0, 1, 2, 3, 6, 7, 8, 20, 22, 23, 24, 42]), 3)
    assert [(chunk.start, chunk.count) for chunk in found] == [
        (0, 3),
        (3, 1),
        (6, 1),
        (7, 2),
        (20, 1),
        (22, 2),
        (24, 1),
        (42, 1),
    ]
    assert chunks_of_ids(manifest, torch.zeros(0, dtype=torch.int64), 3) == []


def test_a_part_of_a_set(shards: Path) -> None:
    part = collection(shards).part(17, seed=1)
    ids = numbers(part)
    assert len(part) == len(set(ids)) == 17 and ids == sorted(ids) == numbers(part, 5)
    whole = torch.cat([seen.images_NCHW for seen in collection(shards).batches(50)])
    assert torch.equal(torch.cat([seen.images_NCHW for seen in part.batches(4)]), whole[ids])
    assert numbers(collection(shards, [])) == []


def test_unreadable_samples_are_left_out(tmp_path: Path) -> None:
    from tests.shards import encoded, small_pictures

    files: list[torch.Tensor | bytes] = list(small_pictures(130))
    files[4] = encoded(small_pictures(1)[0], "png")[:60]
    where = write_shards(tmp_path / "set", files, suffix="png", labels=[])
    found = collection(where)
    assert numbers(found, 7) == [n for n in range(130) if n != 4] and found.classes is None
    assert all(seen.labels_N is None for seen in found.batches(20))


# -------------------------------------------------------------------------------------- by words, of a run


def test_words_for_shards_and_selections(shards: Path, teachers: list, tmp_path: Path) -> None:  # type: ignore[type-arg]
    built = build(parse(Recipe, dfmf(teachers)), CPU)
    finder = Finder(built, None)
    manifest = read_manifest(shards)
    chosen = [0, 5, 6, 7, 30, 42]
    file = select(tmp_path / "chosen.jsonl", manifest, chosen)
    for words in ([str(shards)], [str(shards / "manifest.json")], [f"shards={shards}", "workers=0"]):
        assert numbers(finder.find(words)) == list(range(COUNT))
    selected = finder.find([f"shards={shards}", f"selection={file}"])
    rest = selected.rest()
    assert numbers(selected) == chosen and rest is not None
    assert numbers(rest) == [i for i in range(COUNT) if i not in chosen] and rest.rest() is None
    assert len(Finder(built, None, images=3).find([f"shards={shards}", f"selection={file}"])) == 3
    with pytest.raises(DatasetError, match="no-such"):
        finder.find([f"shards={tmp_path / 'no-such'}"])
    with pytest.raises(ValueError, match="unknown key"):
        finder.find([f"shards={shards}", "selektion=x"])
    other = write_shards(tmp_path / "other", 20)
    with pytest.raises(DatasetError, match=str(file)):
        finder.find([f"shards={other}", f"selection={file}"])


def stream_run(teachers: list, shards: Path, **source: object) -> Build:  # type: ignore[type-arg]
    tree = base(teachers, rounds={"warmup": 0, "main": 3, "student_steps": 1}, batch=5)
    tree["source"] = {"kind": "stream", "reader": {"shards": str(shards), "workers": 0}} | source
    return speak_up(build(parse(Recipe, tree), CPU))


def test_a_runs_own_stream(shards: Path, teachers: list, tmp_path: Path) -> None:  # type: ignore[type-arg]
    whole = Finder(stream_run(teachers, shards), None)
    assert whole.default_pool() == ["stream"] and numbers(whole.find(["stream"])) == list(range(COUNT))
    with pytest.raises(ValueError, match="uses its whole stream"):
        whole.find(["unselected"])
    file = select(tmp_path / "chosen.jsonl", read_manifest(shards), [*range(3, 21)])
    selection = {"kind": "manifest", "path": str(file)}
    some = Finder(stream_run(teachers, shards, selection=selection), None)
    assert numbers(some.find(["stream"])) == [*range(3, 21)]
    assert numbers(some.find(["unselected"])) == [0, 1, 2, *range(21, COUNT)]
    part = {"reader": {"shards": str(shards), "workers": 0, "fraction": 0.6}, "selection": selection}
    built = stream_run(teachers, shards, **part)
    inside = subset(COUNT, 0.6, built.recipe.seed)
    assert 0 < inside.sum() < COUNT
    assert numbers(Finder(built, None).find(["stream"])) == [i for i in range(3, 21) if inside[i]]
    outside = [i for i in (0, 1, 2, *range(21, COUNT)) if inside[i]]
    assert numbers(Finder(built, None).find(["unselected"])) == outside


def test_a_choice_that_was_made_in_training(shards: Path, teachers: list) -> None:  # type: ignore[type-arg]
    built = stream_run(teachers, shards, selection={"kind": "top", "count": 12, "batch": 10})
    with pytest.raises(ValueError, match="before it had selected anything"):
        Finder(built, None).find(["stream"])
    built.trainer.fit()
    found = Finder(built, None)
    chosen, left = numbers(found.find(["stream"])), numbers(found.find(["unselected"]))
    assert len(chosen) == 12 and sorted([*chosen, *left]) == list(range(COUNT))


def test_selected_and_unselected_are_drawn_apart(shards: Path, teachers: list, tmp_path: Path) -> None:  # type: ignore[type-arg]
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchmetrics")
    file = select(tmp_path / "chosen.jsonl", read_manifest(shards), [*range(0, 40, 2)])
    built = stream_run(teachers, shards, selection={"kind": "manifest", "path": str(file)})
    real = (f"shards={write_shards(tmp_path / 'real', 30, classes=NAMES, seed=3)}",)
    wanted = Wanted(fid=True, per_class=True, balance=True, sheet=True, tsne=True, real=real, points=15, patches=(4,))
    found = Measuring(built, wanted, Finder(built, None), tmp_path / "out").results()
    assert [group["name"] for group in found["tsne"]["groups"]] == ["original", "selected", "unselected"]
    assert [group["points"] for group in found["tsne"]["groups"]] == [15, 15, 15]
    assert found["fid"]["by_class"]["real_classes_by"] == "labels" and found["fid"]["real_images"] == 30
    assert found["balance"]["images"] == found["fid"]["pool_images"] == 20
    json.dumps(found)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"balance.png", "sheet.png", "tsne.png"}
