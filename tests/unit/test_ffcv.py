"""FFCV itself: what is compiled comes back, in the order, the slots and the pixels that the tars give."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_dist.cli import main
from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled import beton
from dfkd_dist.data.compiled.about import read_compiled
from dfkd_dist.data.compiled.file import Storing
from dfkd_dist.data.compiled.write import compile_shards
from dfkd_dist.data.datasets import load_image_set
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.selection import Chosen, SelectionWriter
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.stream.order import subset
from dfkd_dist.data.stream.sets import open_set
from dfkd_dist.data.stream.stream import Quarantine, RawBatch, Stream, chunks_of, scan
from tests.encoded import bad_files, good_files
from tests.image_data import pictures, spec_of, write_npz
from tests.shards import encoded, write_shards

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,  # its import alone takes many seconds
    pytest.mark.skipif(
        importlib.util.find_spec("ffcv") is None,
        reason="the extra ffcv is not installed; scripts/install_ffcv.sh says what it needs",
    ),
]

SIZE, BATCH, BAD = 16, 6, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 images of many formats and sizes in unequal shards, and 3 that cannot be read."""
    files = [encoded(image, "png") for image in pictures(40, height=20, width=24)] + list(good_files().values())
    broken = [data for _, data in list(bad_files().values())[-BAD:]]
    folder = write_shards(tmp_path_factory.mktemp("ffcv") / "set", files[:20] + broken + files[20:], per_shard=(9, 14))
    assert len(read_manifest(folder)) == 57 + BAD
    return folder


def compiled(shards: Path, name: str, channels: int = 3, storing: Storing | None = None, **keys: Any) -> Path:
    """Compiled once, beside the shards."""
    path = shards.with_name(f"{name}.beton")
    if not path.exists():
        compile_shards(str(shards), path, SIZE, channels, storing, bad_limit=1.0, **keys)
    return path


@pytest.fixture(scope="module")
def raw(shards: Path) -> Path:
    return compiled(shards, "raw")


def stream(where: Path, rank: int = 0, world_size: int = 1, **keys: Any) -> Stream:
    kind = "ffcv" if where.suffix == ".beton" else "tar"
    spec: dict[str, Any] = {"workers": 0, "window": 10, "bad_limit": 1.0, "kind": kind, "shards": str(where)}
    spec |= {key: keys.pop(key) for key in list(keys) if key in ReaderSpec.model_fields}
    reader = ReaderSpec(**spec)
    options: dict[str, Any] = {"batch": BATCH, "size": SIZE, "channels": 3, "seed": 1, **keys}
    return Stream(open_set(reader), reader, rank=rank, world_size=world_size, **options)


def epochs(s: Stream, count: int = 2) -> Iterator[RawBatch]:
    for step in range(count * s.batches):
        yield s.get(*divmod(step, s.batches))


def numbers(batch: RawBatch) -> list[Any]:
    """All but the pixels."""
    tensors = (batch.valid_N, batch.slots_N, batch.ids_N, batch.labels_N)
    bad = [(sample.id, sample.shard, sample.index, sample.cause, sample.detail) for sample in batch.bad]
    return [*(tensor.tolist() for tensor in tensors), bad]


def same(one: RawBatch, other: RawBatch) -> bool:
    return numbers(one) == numbers(other) and torch.equal(one.images_NCHW, other.images_NCHW)


# ------------------------------------------------------------------------------------------- the same promises


def test_the_layout_is_that_of_ffcv() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    expected = types.get_metadata_type([RGBImageField(), IntField(), IntField()])
    pairs = [
        (beton.SAMPLE, expected),
        (beton._HEADER, types.HeaderType),
        (beton._FIELD, types.FieldDescType),
        (beton._PIECE, types.ALLOC_TABLE_TYPE),
    ]
    for ours, theirs in pairs:
        places = [[kinds.fields[name][1] for name in kinds.names] for kinds in (ours, theirs)]
        assert ours.itemsize == theirs.itemsize and places[0] == places[1]
    assert types.CURRENT_VERSION == beton._VERSION


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (3, 4)])
def test_raw_batches_are_those_of_the_tars(shards: Path, raw: Path, rank: int, world_size: int) -> None:
    """Ids, slots, labels, pixels, masked samples and what is said of them; with four ranks slots are unequal."""
    ours, tars = stream(raw, rank, world_size), stream(shards, rank, world_size)
    assert ours.batches == tars.batches == 10
    assert all(same(*pair) for pair in zip(epochs(ours), epochs(tars), strict=True))
    assert all(same(ours.get(*at), tars.get(*at)) for at in ((7, 3), (0, 9), (0, 0)))  # also to anywhere
    assert ours.quarantine.counts == tars.quarantine.counts and ours.traffic.amplification == 1


def test_batches_stay_what_they_are(raw: Path) -> None:
    """FFCV's own are views of memory that is used again."""
    s = stream(raw)
    seen = list(epochs(s, 1))
    assert all(same(batch, s.get(0, g)) for g, batch in enumerate(seen))


def test_a_part_of_it(shards: Path, raw: Path) -> None:
    ours, tars = stream(raw, fraction=0.6), stream(shards, fraction=0.6)
    chosen_N = subset(len(tars.manifest), 0.7, seed=9)
    for s in (ours, tars):
        s.choose(chosen_N)
    assert 0 < ours.batches == tars.batches < 6
    assert all(same(*pair) for pair in zip(epochs(ours), epochs(tars), strict=True))


def test_grey_images(shards: Path) -> None:
    ours, tars = stream(compiled(shards, "grey", 1), channels=1), stream(shards, channels=1)
    assert all(same(*pair) for pair in zip(epochs(ours, 1), epochs(tars, 1), strict=True))


def test_a_compiled_selection(shards: Path, tmp_path: Path) -> None:
    """It is read as the whole set under the same selection would be."""
    manifest = read_manifest(shards)
    chosen_N = subset(len(manifest), 0.5, seed=2)
    chosen_N[20] = True  # cannot be decoded
    path, count = tmp_path / "chosen.jsonl", int(chosen_N.sum())
    with SelectionWriter(path, manifest, count, {}, []) as writer:
        for number, shard in enumerate(manifest.shards):
            here_N = chosen_N[shard.start : shard.start + shard.count]
            writer.add(number, manifest.keys(number), Chosen(np.flatnonzero(here_N)))
    ours, tars = stream(compiled(shards, "chosen", selection=str(path))), stream(shards)
    tars.choose(chosen_N)
    assert ours.batches == tars.batches == count // BATCH
    assert all(same(*pair) for pair in zip(epochs(ours), epochs(tars), strict=True))
    ours.choose(chosen_N)
    with pytest.raises(DatasetError, match=r"was compiled without \d+ of the samples that are selected"):
        ours.choose(~chosen_N)


def test_a_scan(shards: Path, raw: Path) -> None:
    found = []
    for where in (raw, shards):
        reader = ReaderSpec(shards=str(where), kind="ffcv" if where == raw else "tar", workers=0, bad_limit=1.0)
        manifest, quarantine = open_set(reader), Quarantine(None)
        keys: dict[str, Any] = {"batch": 5, "size": SIZE, "channels": 3, "chunks": chunks_of(manifest, 5)}
        found.append(list(scan(manifest, reader, **keys, quarantine=quarantine)))
        assert quarantine.bad == BAD
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_a_file_that_is_compiled_anew_meanwhile(raw: Path) -> None:
    reader = ReaderSpec(shards=str(raw), kind="ffcv", workers=0)
    manifest = replace(open_set(reader), digest="another")
    with pytest.raises(DatasetError, match="compiled anew since it was opened"):
        scan(manifest, reader, batch=6, size=SIZE, channels=3, chunks=chunks_of(manifest, 6))


def test_torch_keeps_its_threads(raw: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stream(raw).get(0, 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_with_reading_processes(shards: Path, raw: Path) -> None:
    ours, tars = stream(raw, workers=2), stream(shards)
    assert all(same(*pair) for pair in zip(epochs(ours), epochs(tars), strict=True))
    assert same(ours.get(5, 5), tars.get(5, 5))
    ours.close()


# ----------------------------------------------------------------------------------------------------- storing


def images_of(path: Path) -> Tensor:
    s = stream(path, batch=57 + BAD, shuffle=False)
    return s.get(0, 0).images_NCHW.float()


def test_jpg_is_close_and_proportion_is_some_of_each(shards: Path, raw: Path) -> None:
    exact_NCHW = images_of(raw)
    jpg_NCHW = images_of(compiled(shards, "jpg", storing=Storing("jpg", quality=95)))
    some_NCHW = images_of(compiled(shards, "some", storing=Storing("proportion", quality=95, share=0.4)))
    off_N = (jpg_NCHW - exact_NCHW).abs().mean(dim=(1, 2, 3))
    assert 0 < float(off_N.mean()) < 4 and float(off_N.max()) < 20  # deep grey noise is the hardest
    as_jpg_N = torch.from_numpy(subset(57 + BAD, 0.4, seed=0))
    assert torch.equal(some_NCHW, torch.where(as_jpg_N[:, None, None, None], jpg_NCHW, exact_NCHW))


def test_the_same_bytes_again(shards: Path, raw: Path, tmp_path: Path) -> None:
    made = compile_shards(str(shards), tmp_path / "again.beton", SIZE, 3, workers=3, bad_limit=1.0)
    assert made.about == read_compiled(raw).about
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.beton", "again.beton.json"]


def test_nothing_is_left_of_a_failed_one(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out.beton").write_bytes(b"older")
    with pytest.raises(DatasetError, match="allowed by reader.bad_limit: 0.0%"):
        many = write_shards(tmp_path / "many", [b"no image", *pictures(120).unbind()])
        compile_shards(str(many), tmp_path / "out.beton", 8, 3, bad_limit=0.0, overwrite=True)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.beton"]
    assert (tmp_path / "out.beton").read_bytes() == b"older"
    only = write_shards(tmp_path / "only", [b"no image"] * 3)
    with pytest.raises(DatasetError, match="not one of 3 images can be decoded"):
        compile_shards(str(only), tmp_path / "new.beton", 8, 3, bad_limit=1.0)


# ------------------------------------------------------------------------------------------------ the commands


def test_the_command_and_its_json(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.beton"
    command = ["shards", "compile", str(shards), str(out), "--size", str(SIZE), "--bad-limit", "1", "--workers", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("57 images of 16 px, 16.8 MB, 3 could not be decoded: ")
    about = json.loads((tmp_path / "out.beton.json").read_text())
    assert about["set"] == read_manifest(shards).digest and about["count"] == 57 and len(about["bad"]) == BAD
    assert about["mode"] == "raw" and about["ids"] == "int64" and about["classes"] == list("01234")


def test_an_evaluation_set(tmp_path: Path) -> None:
    """Compiled by the command, and read as `kind: ffcv`: the same images and labels."""
    source = write_npz(tmp_path / "set.npz", classes=np.array(list("abcde")))
    out = str(tmp_path / "test.beton")
    assert main(["shards", "compile", out, "--data", "kind=npz", f"path={source}", "size=8", "channels=1"]) == 0
    found, expected = (load_image_set(spec_of(*at), "test") for at in (("ffcv", out), ("npz", source)))
    places = torch.tensor([7, 0, 3, 3])
    assert torch.equal(found.images(places), expected.images(places)) and found.size == 8 and found.channels == 1
    assert torch.equal(found.labels_N, expected.labels_N) and found.classes == expected.classes == list("abcde")
    assert len(load_image_set(spec_of("ffcv", out, limit=4), "test")) == 4
    with pytest.raises(DatasetError, match="found 'train', but the file was compiled from 'test' alone"):
        load_image_set(spec_of("ffcv", out), "train")
    assert len(stream(Path(out), batch=5, size=8, channels=1).get(0, 1).labels_N) == 5  # it may be streamed as well
