"""Every kind of source as an ordered list of samples, and what is said of sources that cannot be used."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.build import BuildOptions, build
from dfkd_dist.data.shards.encode import decode_native
from dfkd_dist.data.shards.inputs import Input, keys_of
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.shards.sources import SourceOptions, kind_of, open_input, read_class_names
from tests.image_data import pictures, write_domains, write_folder, write_jpg_npz, write_npz
from tests.shards import write_shards
from tests.unit.test_datasets import write_idx

KEEP = BuildOptions(maxcount=4)


def stored(manifest: Manifest) -> list[tuple[str, bytes, int]]:
    """(key, image bytes, label) of every sample, read at the manifest's offsets."""
    keys = [key for keys in manifest.all_keys() for key in keys]
    shard_n, _ = manifest.where(np.arange(len(manifest)))
    tars = [Path(manifest.location(shard)).read_bytes() for shard in range(len(manifest.shards))]
    ends = manifest.offsets_N + manifest.sizes_N
    places = zip(shard_n, manifest.offsets_N, ends, strict=True)
    images = [tars[shard][start:end] for shard, start, end in places]
    return list(zip(keys, images, manifest.labels_N.tolist(), strict=True))


def built(source: Input, folder: Path, options: BuildOptions = KEEP) -> list[tuple[str, bytes, int]]:
    """Build, and check that what is read back at the offsets is what the source gives."""
    samples = stored(build(source, folder, options))
    assert [key for key, _, _ in samples] == [source.key(i) for i in range(len(source))]
    assert [label for _, _, label in samples] == source.labels_N.tolist()
    for i, (_, data, _) in enumerate(samples):
        given = source.read(i)
        assert torch.equal(decode_native(data), given) if isinstance(given, torch.Tensor) else data == given
    return samples


def test_a_folder_of_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", {"cat": 5, "ant": 4})
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "00.png").rename(root / "cat" / "deep" / "a.b.png")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    source = open_input(str(root))
    samples = built(source, tmp_path / "out")
    expected = ["ant/00", "ant/01", "ant/02", "ant/03", "cat/01", "cat/02", "cat/03", "cat/04", "cat/deep/a_b"]
    assert [key for key, _, _ in samples] == expected
    assert [label for _, _, label in samples] == [0] * 4 + [1] * 5
    assert samples[-1][1] == (root / "cat" / "deep" / "a.b.png").read_bytes()
    made = read_manifest(tmp_path / "out")
    assert made.classes == ("ant", "cat") and [shard.count for shard in made.shards] == [4, 4, 1]
    assert [entry["members"] for entry in made.entries()][0] == ["png", "jpg", "jpg", "png"]  # .JPEG is jpg


def test_a_folder_without_classes_and_one_with_parts(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "flat", {"x": 4}) / "x"
    source = open_input(str(root))
    assert source.classes is None and {label for _, _, label in built(source, tmp_path / "out")} == {-1}
    write_folder(tmp_path / "parts" / "train", {"a": 3, "b": 2})
    write_folder(tmp_path / "parts" / "test", {"b": 1})
    assert len(open_input(str(tmp_path / "parts"))) == 5
    test = open_input(str(tmp_path / "parts"), None, SourceOptions(split="test"))
    assert len(test) == 1 and test.classes == ["b"]
    write_folder(tmp_path / "trap", {"train": 2, "car": 1})  # a class may be called so
    assert open_input(str(tmp_path / "trap")).classes == ["car", "train"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mixed", {"a": 2})
    (root / "loose.png").write_bytes((root / "a" / "00.png").read_bytes())
    (tmp_path / "empty").mkdir()
    for where, options, said in [
        (root, None, "both beside and inside"),
        (tmp_path / "empty", None, "found no images"),
        (tmp_path / "nowhere", None, "no such file or folder"),
        (root / "a", SourceOptions(split="test"), "has no parts"),
        (root / "a", SourceOptions(name="MNIST"), r"name: a source of kind folder takes none; .*\['torchvision'\]"),
    ]:
        with pytest.raises(DatasetError, match=said):
            open_input(str(where), None, options)
    with pytest.raises(DatasetError, match="'tars', allowed are"):
        open_input(str(root), "tars")


def test_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "grey.npz")
    samples = built(open_input(str(path)), tmp_path / "grey")
    assert len(samples) == 30 and samples[7][2] == 2 and samples[7][0] == "000000007"
    assert torch.equal(decode_native(samples[7][1]), pictures(30, 1)[7])
    assert len(open_input(str(path), None, SourceOptions(split="test"))) == 10
    colour = pictures(6).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", x=colour)
    source = open_input(str(tmp_path / "plain.npz"))
    assert source.classes is None and len(built(source, tmp_path / "plain")) == 6
    np.savez(tmp_path / "labelled.npz", x=colour, y=np.arange(6) % 2, classes=np.array(["no", "yes"]))
    built(open_input(str(tmp_path / "labelled.npz")), tmp_path / "labelled")
    assert read_manifest(tmp_path / "labelled").classes == ("no", "yes")


def test_jpg_containers(tmp_path: Path) -> None:
    path = write_jpg_npz(tmp_path / "set.npz")
    samples = built(open_input(str(path)), tmp_path / "out")
    with np.load(path) as archive:
        data, offsets = archive["train_bytes"], archive["train_offsets"]
    assert [image for _, image, _ in samples] == [
        data[start:end].tobytes() for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    assert read_manifest(tmp_path / "out").classes == tuple("abcde")
    assert len(built(open_input(str(write_domains(tmp_path / "whole.npz"))), tmp_path / "whole")) == 80
    unlabelled = open_input(str(write_jpg_npz(tmp_path / "bare.npz", train_y=None, test_y=None, classes=None)))
    assert unlabelled.classes is None and len(unlabelled) == 20


@pytest.mark.parametrize(
    ("change", "split", "said"),
    [
        ({"train_bytes": None}, None, "has no 'train_bytes'; expected one of"),
        ({"train_offsets": np.arange(3.0)}, None, "'train_offsets': expected integers"),
        ({"train_y": np.arange(19)}, None, "'train_y': expected one label for each of 20"),
        ({"train_y": np.full(20, 9)}, None, r"'train_y': expected labels 0 \.\. 4, found 9"),
        ({}, "val", "has no 'val_bytes'; expected one of"),
        ({"x_bytes": np.zeros(9, np.uint8), "x_offsets": np.array([0, 9])}, "test", "has no parts"),
    ],
)
def test_archives_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], split: str | None, said: str) -> None:
    path = write_jpg_npz(tmp_path / "set.npz", **change)
    with pytest.raises(DatasetError, match=said) as error:
        open_input(str(path), None, SourceOptions(split=split))
    assert "set.npz" in str(error.value)


def test_a_torchvision_set(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pictures(count, 1, 28, 28, seed=count)[:, 0].numpy())
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    source = open_input(str(tmp_path), "torchvision", SourceOptions(name="FashionMNIST", split="test"))
    samples = built(source, tmp_path / "out")
    assert torch.equal(decode_native(samples[3][1]), pictures(10, 1, 28, 28, seed=10)[3])
    assert read_manifest(tmp_path / "out").classes[0] == "T-shirt/top"  # type: ignore[index]
    for options, said in ((SourceOptions(), "needs the set's name"), (SourceOptions(name="Foo"), "allowed are")):
        with pytest.raises(DatasetError, match=said):
            open_input(str(tmp_path), "torchvision", options)


def rows(root: Path, labels: list[str]) -> list[list[str]]:
    """Files with names of all kinds, and their rows in a list."""
    names = ["b/2.jpg", "b/1.png", "a b,c.jpg", "ü.jpg", "b/1.jpg"]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(encode_jpeg(pictures(1, seed=i)[0]).numpy().tobytes())
    return [[name, label] for name, label in zip(names, labels, strict=True)]


def write_csv(path: Path, header: list[str], lines: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def test_lists_as_csv_parquet_and_text(tmp_path: Path) -> None:
    lines = rows(tmp_path / "pictures", ["dog", "cat", "dog", "", "cat"])
    path = write_csv(tmp_path / "list.csv", ["path", "label"], lines)
    source = open_input(str(path), None, SourceOptions(root=str(tmp_path / "pictures")))
    samples = built(source, tmp_path / "out")
    assert [key for key, _, _ in samples] == ["b/2", "b/1", "a b,c", "ü", "b/1-4"]
    assert source.labels_N.tolist() == [1, 0, 1, -1, 0] and source.classes == ["cat", "dog"]
    assert samples[1][1][:2] == b"\xff\xd8"  # named .png, but a jpg
    assert next(read_manifest(tmp_path / "out").entries())["members"] == ["jpg"] * 4

    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"file": [line[0] for line in lines], "n": range(5), "y": [3, None, 0, 1, 2]})
    parquet.write_table(table, tmp_path / "pictures" / "list.parquet")
    source = open_input(str(tmp_path / "pictures" / "list.parquet"), None, SourceOptions(label_column="y"))
    assert source.labels_N.tolist() == [3, -1, 0, 1, 2] and source.classes == ["0", "1", "2", "3"]
    assert built(source, tmp_path / "out2")[0][1] == samples[0][1]

    (tmp_path / "pictures" / "list.txt").write_text("b/2.jpg\n\nü.jpg\n", encoding="utf-8")
    source = open_input(str(tmp_path / "pictures" / "list.txt"))
    assert len(built(source, tmp_path / "out3")) == 2 and source.classes is None
    absolute = write_csv(tmp_path / "far.csv", ["x", "Path"], [["1", str(tmp_path / "pictures" / "ü.jpg")]])
    assert built(open_input(str(absolute)), tmp_path / "out4")[0][1] == samples[3][1]


def test_class_names_that_are_given_order_the_labels(tmp_path: Path) -> None:
    lines = rows(tmp_path, ["dog", "cat", "2", "-1", "0"])
    path = write_csv(tmp_path / "list.csv", ["path", "label"], lines)
    (tmp_path / "names.txt").write_text("dog\ncow\ncat\n")
    names = read_class_names(str(tmp_path / "names.txt"))
    source = open_input(str(path), None, SourceOptions(classes=names))
    assert source.labels_N.tolist() == [0, 2, 2, -1, 0] and source.classes == ["dog", "cow", "cat"]
    (tmp_path / "names.json").write_text('["dog", "dog"]')
    with pytest.raises(DatasetError, match=r"names a class twice: \['dog'\]"):
        read_class_names(str(tmp_path / "names.json"))


@pytest.mark.parametrize(
    ("header", "line", "options", "said"),
    [
        (["a", "b"], ["x", "y"], {}, r"no path column found among \['a', 'b'\]"),
        (["path", "file"], ["x", "y"], {}, r"columns \['path', 'file'\]: name the one"),
        (["path"], ["x"], {"label_column": "kind"}, "column 'kind' is missing"),
        (["path", "label"], ["x"], {}, "line 2 has 1 columns, its header 2"),
        (["path", "label"], ["", "1"], {}, "image 0: its path is empty"),
        (["path", "label"], ["x", "-3"], {}, "image 0: label -3; allowed"),
        (["path", "label"], ["x", "emu"], {"classes": ["a", "b"]}, "label 'emu'; allowed"),
        (["path"], ["nowhere.jpg"], {}, "nowhere.jpg: no such file"),
    ],
)
def test_lists_that_cannot_be_used(
    tmp_path: Path, header: list[str], line: list[str], options: dict[str, Any], said: str
) -> None:
    path = write_csv(tmp_path / "list.csv", header, [line])
    with pytest.raises(DatasetError, match=said):
        open_input(str(path), None, SourceOptions(**options)).read(0)


def test_a_set_of_shards_is_dealt_anew(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 30)
    before = stored(read_manifest(tmp_path / "in"))
    source = open_input(str(tmp_path / "in"))
    assert built(source, tmp_path / "out") == before and source.kind == "shards"
    with pytest.raises(DatasetError, match="holds the tars that are to be read"):
        build(source, tmp_path / "in", KEEP, overwrite=True)
    assert stored(read_manifest(tmp_path / "in")) == before


def test_kinds_by_their_looks(tmp_path: Path) -> None:
    for name, kind in [
        ("a.csv", "list"),
        ("a.npz", "npz"),
        ("https://h/{0..3}.tar", "tar"),
        ("s/manifest.json", "shards"),
    ]:
        assert kind_of(name) == kind
    with pytest.raises(DatasetError, match="cannot tell what kind"):
        kind_of("https://host/somewhere")


def test_keys_are_unlike_each_other_and_webdataset_can_split_them() -> None:
    names = [
        "a/1.jpg",
        "a/1.png",
        "a/1-1.x",
        "../b/.hidden",
        "/abs/x.tar.gz",
        "__m__.png",
        "é" * 80 + ".jpg",
        "..",
        "a\n.jpg",
    ]
    keys = keys_of(names)
    assert len(set(keys)) == len(names)
    assert keys[:6] == ["a/1", "a/1-1", "a/1-1-2", "b/_hidden", "abs/x_tar", "x__m__"]
    assert keys[6:] == ["000000006", "000000007", "a_"]
    assert all("." not in key.rpartition("/")[2] for key in keys)
