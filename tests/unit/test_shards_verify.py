"""Damage of every kind is found, named by its cause, and left out of a clean copy; and what `info` shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torchvision.io import decode_image, read_file

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.clean import write_clean
from dfkd_dist.data.shards.index_in_place import index_in_place
from dfkd_dist.data.shards.info import info, sheet
from dfkd_dist.data.shards.manifest import read_manifest, write_manifest
from dfkd_dist.data.shards.verify import Finding, verify
from tests.shards import PER_SHARD, encoded, small_pictures, write_shards
from tests.unit.test_shards_inputs import stored
from tests.unit.test_shards_manifest import edited

SAMPLES = sum(PER_SHARD)


def causes(findings: list[Finding]) -> list[tuple[str, str, str | None]]:
    return [(finding.shard, finding.cause, finding.key) for finding in findings]


def damaged(folder: Path, shard: int, change: Callable[[bytearray], object]) -> None:
    path = folder / f"{shard:06d}.tar"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def cleaned(folder: Path, out: Path, workers: int = 1) -> list[tuple[str, bytes, int]]:
    """Make a clean copy, check that it is clean, and that plain webdataset reads the same."""
    manifest = write_clean(folder, verify(folder), out, workers=workers)
    assert not verify(out).findings
    samples = stored(manifest)
    locations = [manifest.location(shard) for shard in range(len(manifest.shards))]
    found = list(webdataset.WebDataset(locations, shardshuffle=False))
    assert [(s["__key__"], s.get("jpg", s.get("png")), int(s["cls"])) for s in found] == samples
    return samples


def test_a_whole_set(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in")
    report = verify(folder, workers=2)
    assert (report.shards, report.samples, report.findings, report.unlisted) == (5, SAMPLES, [], [])
    assert report.table() == f"5 shards, {SAMPLES} images: nothing wrong"
    assert cleaned(folder, tmp_path / "out") == stored(read_manifest(folder))
    assert (tmp_path / "out" / "000003.tar").read_bytes() == (folder / "000003.tar").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_flipped_bits_missing_shards_and_cut_ones(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "in")
    manifest = read_manifest(folder)
    before = stored(manifest)
    at = int(manifest.offsets_N[9] + manifest.sizes_N[9] // 2)
    damaged(folder, 1, lambda data: data.__setitem__(at, data[at] ^ 4))
    (folder / "000002.tar").unlink()
    cut = int(manifest.offsets_N[30] + 50)
    damaged(folder, 3, lambda data: data.__delitem__(slice(cut, None)))
    report = verify(folder, workers=workers)
    assert causes(report.findings) == [
        ("000001.tar", "sha256", None),
        ("000001.tar", "changed", "000009"),
        ("000002.tar", "missing", None),
        ("000003.tar", "size", None),
        ("000003.tar", "tar", None),
        ("000003.tar", "cut", "000030"),
        ("000003.tar", "cut", "000031"),
        ("000003.tar", "cut", "000032"),
    ]
    table = report.table(examples=1)
    assert "cut                 3" in table and "and 2 more" in table and "8 findings" in table
    lost = {9, *range(19, 24), 30, 31, 32}
    assert cleaned(folder, tmp_path / "out", workers) == [s for i, s in enumerate(before) if i not in lost]
    assert [shard.name for shard in read_manifest(tmp_path / "out").shards] == [f"00000{i}.tar" for i in (0, 1, 3, 4)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["000009", "", "000030", "000031", "000032"]
    assert lines[1]["reason"].startswith("missing: ") and lines[0]["reason"].startswith("changed: its check sum")


def test_a_broken_header_costs_no_image(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in")
    before = stored(manifest := read_manifest(folder))
    header = int(manifest.offsets_N[10]) - 512
    damaged(folder, 1, lambda data: data.__setitem__(slice(header, header + 8), b"XXXXXXXX"))
    assert causes(verify(folder).findings) == [("000001.tar", "sha256", None), ("000001.tar", "tar", None)]
    assert cleaned(folder, tmp_path / "out") == before


def test_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    images: list[torch.Tensor | bytes] = [encoded(image, "jpg") for image in small_pictures(9)]
    images[2] = b"no image at all"
    images[5] = bytes(images[5])[:40]  # type: ignore[arg-type]
    folder = write_shards(tmp_path / "in", images, per_shard=3)
    report = verify(folder, workers=2)
    assert causes(report.findings) == [("000000.tar", "undecodable", "000002"), ("000001.tar", "undecodable", "000005")]
    assert "neither a jpg nor a png nor a webp file" in report.findings[0].detail
    assert not verify(folder, decode=False).findings
    assert [key for key, _, _ in cleaned(folder, tmp_path / "out")] == [f"00000{i}" for i in (0, 1, 3, 4, 6, 7, 8)]
    with pytest.raises(DatasetError, match="holds the shards that are to be copied"):
        write_clean(folder, report, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["labels"].__setitem__(3, 0), "label of 1 images; of the first it says 0, the tar 3"),
        (lambda e: e["keys"].__setitem__(3, "x"), "key of 1 images; of the first it says 'x', the tar '000003'"),
        (lambda e: e["offsets"].__setitem__(3, e["offsets"][3] + 1), "offset of 1 images"),
        (lambda e: e["sizes"].__setitem__(3, e["sizes"][3] - 1), "size of 1 images"),
        (lambda e: e["members"].__setitem__(3, "webp"), "member of 1 images"),
        (lambda e: [e.update(count=6), *(e[k].pop() for k in e if isinstance(e[k], list))], "lists 6 images"),
        (lambda e: [e[k].reverse() for k in e if isinstance(e[k], list)], "offset of 6 images"),
    ],
)
def test_a_tampered_manifest_contradicts_its_tars(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    folder = write_shards(tmp_path / "in")
    before = stored(read_manifest(folder))
    edited(folder, change)
    manifest = folder / "manifest.json"
    if "lists" in said:
        manifest.write_text(manifest.read_text().replace('"count": 43', '"count": 42'))
    report = verify(folder)
    assert {finding.cause for finding in report.findings} == {"manifest"}
    assert any(said in finding.detail for finding in report.findings)
    assert cleaned(folder, tmp_path / "out") == before  # the tars are whole, and they are believed


def test_a_shard_that_was_exchanged_is_not_believed(tmp_path: Path) -> None:
    folder, other = write_shards(tmp_path / "in"), write_shards(tmp_path / "other", seed=9)
    before = stored(read_manifest(folder))
    (folder / "000001.tar").write_bytes((other / "000001.tar").read_bytes())
    report = verify(folder)
    assert {finding.cause for finding in report.findings if finding.key is None} <= {"sha256", "size", "manifest"}
    assert sum(finding.cause == "changed" for finding in report.findings) == 12
    assert cleaned(folder, tmp_path / "out") == before[:7] + before[19:]


def test_a_manifest_of_others_without_check_sums_of_images(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in")
    entries = [{k: v for k, v in e.items() if k not in ("crc32s", "members")} for e in read_manifest(folder).entries()]
    write_manifest(folder, entries, list("01234"))
    assert not verify(folder).findings
    damaged(folder, 0, lambda data: data.__setitem__(slice(1536, 1546), bytes(10)))
    assert [f.cause for f in verify(folder).findings] == ["sha256", "undecodable"]
    assert len(cleaned(folder, tmp_path / "out")) == SAMPLES - 1


def test_nothing_good_is_left(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", [b"x", b"y"], per_shard=1)
    with pytest.raises(DatasetError, match="not one image could be stored; the first because: undecodable"):
        write_clean(folder, verify(folder), tmp_path / "out")


def test_tars_that_the_manifest_does_not_list_are_mentioned(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    (folder / "extra.tar").write_bytes(b"")
    report = verify(folder)
    assert report.unlisted == ["extra.tar"] and not report.findings and "note: tars that" in report.table()


# --------------------------------------------------------------------------------------------- info


def test_info_of_a_labelled_set(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path, classes=["ant", "bee", "cat", "dog", "emu", "fox"], labels=[-1] + [i % 5 for i in range(42)]
    )
    found, manifest = info(folder), read_manifest(folder)
    assert (found.shards, found.samples, found.unlabelled) == (5, 43, 1)
    assert found.classes == {"ant": 9, "bee": 9, "cat": 8, "dog": 8, "emu": 8, "fox": 0}
    assert found.formats == {"jpg": 22, "png": 21} and found.looked_at == 43 and found.unreadable == 0
    heights = sorted(image.shape[1] for image in small_pictures(43))
    assert found.sizes["height"] == [heights[0], heights[21], heights[-1]]
    assert found.sizes["bytes"][0] == manifest.sizes_N.min() and found.image_bytes == manifest.sizes_N.sum()
    table = found.table()
    assert "6: ant 9, bee 9" in table and "1 unlabelled" in table and manifest.digest in table


def test_info_of_an_unlabelled_set_with_a_bad_image(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [b"bad", encoded(small_pictures(1)[0], "png")], labels=[], suffix="png")
    found = info(folder)
    assert found.classes == {} and found.unreadable == 1 and "classes   none" in found.table()
    assert "unreadable 1 of 2" in found.table()
    for shard in folder.glob("*.tar"):
        shard.unlink()
    assert info(folder).unreadable == 2  # still says what the manifest says


def test_info_where_the_manifest_has_no_suffixes(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    write_manifest(
        folder, [{k: v for k, v in e.items() if k != "members"} for e in read_manifest(folder).entries()], list("01234")
    )
    assert info(folder).formats == {"jpg": 22, "png": 21}


def test_a_contact_sheet(tmp_path: Path) -> None:
    images: list[torch.Tensor | bytes] = [torch.full((3, 9, 9), 20 * i, dtype=torch.uint8) for i in range(10)]
    images[4] = b"broken"
    folder = write_shards(tmp_path / "in", images, suffix="png")
    sheet(folder, tmp_path / "new" / "sheet.png", images=10, side=6)
    canvas = decode_image(read_file(str(tmp_path / "new" / "sheet.png")))
    assert canvas.shape == (3, 4 * 8 + 2, 3 * 8 + 2)
    middles = [int(canvas[0, 5 + 8 * (i // 3), 5 + 8 * (i % 3)]) for i in range(10)]
    assert middles == [0, 20, 40, 60, 255, 100, 120, 140, 160, 180]
    assert canvas[0, 10, 10] == 0 and canvas[0, 0].min() == 255  # a frame around the broken one; white between them
    for seed in (1, 1, 2):
        sheet(folder, tmp_path / f"{seed}.png", images=4, side=6, seed=seed)
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_an_indexed_tar_is_cleaned_into_a_set(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", [b"bad", *small_pictures(5)], per_shard=6)
    (folder / "manifest.json").unlink()
    index_in_place(str(folder), tmp_path / "index")
    assert len(cleaned(tmp_path / "index", tmp_path / "out")) == 5
