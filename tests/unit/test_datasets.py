"""Labelled image sets from digits, folders, torchvision and the real archives."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_dist.data.datasets import DatasetError, load_image_set
from dfkd_dist.data.pixels import convert_images
from tests.image_data import all_images, pictures, spec_of, write_folder


def test_digits_are_split_once_and_for_all():
    parts = {
        split: load_image_set(spec_of("digits", val_fraction=0.2), split)
        for split in ("train", "val", "test")
    }
    sizes = {split: len(part) for split, part in parts.items()}
    assert sum(sizes.values()) == 1797
    assert abs(sizes["test"] - 0.4 * 1797) < 10 and abs(sizes["val"] - 0.2 * 0.6 * 1797) < 10
    for part in parts.values():
        counts = torch.bincount(part.labels_N, minlength=10)
        assert part.classes == list("0123456789") and counts.max() - counts.min() < 0.1 * len(part)
    together = torch.cat([all_images(part) for part in parts.values()]).flatten(1)
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().data)
    assert torch.equal((together * (16 / 255)).round().double().sum(0), original.sum(0))
    assert together.max() == 255
    again = load_image_set(spec_of("digits", val_fraction=0.2), "train")
    assert torch.equal(all_images(again), all_images(parts["train"]))


def test_digits_take_the_size_and_channels_of_the_spec():
    image_set = load_image_set(spec_of("digits", size=16, channels=3, limit=7), "test")
    assert (len(image_set), image_set.size, image_set.channels) == (7, 16, 3)
    images = image_set.images(torch.tensor([6, 0, 6]))
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert image_set.labels_N.dtype == torch.int64


def test_a_folder_without_splits_is_split_by_class(tmp_path):
    root = write_folder(tmp_path / "set", {"cat": 10, "ant": 20})
    spec = spec_of("folder", root, channels=3, val_fraction=0.25)
    parts = {split: load_image_set(spec, split) for split in ("train", "val", "test")}
    counts = {split: torch.bincount(part.labels_N).tolist() for split, part in parts.items()}
    assert counts == {"train": [12, 6], "val": [4, 2], "test": [4, 2]}
    assert parts["train"].classes == ["ant", "cat"]
    paths = [path for part in parts.values() for path in part.paths]
    assert len(set(paths)) == 30
    assert all(
        (Path(path).parent.name == "cat") == (label == 1)
        for part in parts.values()
        for path, label in zip(part.paths, part.labels_N.tolist(), strict=True)
    )


def test_a_folder_is_decoded_resized_and_cropped_on_demand(tmp_path):
    root = write_folder(tmp_path / "set" / "test", {"cat": 6})
    write_folder(tmp_path / "set" / "train", {"cat": 1})
    for channels in (1, 3):
        part = load_image_set(spec_of("folder", root.parent, size=6, channels=channels), "test")
        images = part.images(torch.tensor([3, 0, 4]))
        originals = pictures(6, height=12, width=16, seed=3)[[3, 0, 4]]
        expected = convert_images(originals, size=6, channels=channels)
        assert images.shape == (3, channels, 6, 6)
        # Files 0 and 3 are png (exact, but for the rounding of grey), file 4 is a jpg.
        assert (images.int() - expected.int())[:2].abs().max() <= (0 if channels == 3 else 2)
        assert (images.int() - expected.int()).abs().max() <= 24
    assert part.images(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 6, 6)


@pytest.mark.parametrize("own_val", [False, True])
def test_folder_splits_and_validation(tmp_path, own_val):
    write_folder(tmp_path / "train", {"a": 8, "b": 4})
    write_folder(tmp_path / "test", {"b": 3})
    if own_val:
        write_folder(tmp_path / "val", {"a": 2, "b": 2})
    spec = spec_of("folder", tmp_path, channels=3, val_fraction=0.25)
    counts = {
        split: torch.bincount(load_image_set(spec, split).labels_N, minlength=2).tolist()
        for split in ("train", "val", "test")
    }
    kept = {"train": [8, 4], "val": [2, 2]} if own_val else {"train": [6, 3], "val": [2, 1]}
    assert counts == {**kept, "test": [0, 3]}


def test_the_first_files_of_a_folder_are_balanced(tmp_path):
    write_folder(tmp_path / "train", {"a": 8, "b": 4, "c": 6})
    spec = spec_of("folder", tmp_path, limit=6, val_fraction=0.0)
    assert load_image_set(spec, "train").labels_N.tolist() == [0, 1, 2, 0, 1, 2]


def test_folder_errors_name_the_place(tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        load_image_set(spec_of("folder", tmp_path / "nowhere"), "train")
    with pytest.raises(DatasetError, match="found no images"):
        load_image_set(spec_of("folder", tmp_path), "train")
    write_folder(tmp_path / "set" / "train", {"a": 2})
    with pytest.raises(DatasetError, match="test: no such folder; found \\['train'\\]"):
        load_image_set(spec_of("folder", tmp_path / "set"), "test")
    write_folder(tmp_path / "set" / "test", {"a": 2, "x": 2})
    with pytest.raises(DatasetError, match="\\['x'\\].*allowed are \\['a'\\]"):
        load_image_set(spec_of("folder", tmp_path / "set"), "test")
    (tmp_path / "set" / "train" / "a" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    broken = load_image_set(spec_of("folder", tmp_path / "set", val_fraction=0.0), "train")
    with pytest.raises(DatasetError, match="a/00.png: not a readable image"):
        all_images(broken)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The MNIST file format, with and without gzip, as torchvision leaves both."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_torchvision_sets_are_read_where_they_lie(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pictures(count, 1, 28, 28, seed=count)[:, 0].numpy())
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    spec = spec_of("torchvision", tmp_path, name="FashionMNIST", size=28, val_fraction=0.5)
    test = load_image_set(spec, "test")
    assert torch.equal(all_images(test), pictures(10, 1, 28, 28, seed=10))
    assert test.labels_N.tolist() == list(range(10)) and test.classes[0] == "T-shirt/top"
    assert len(load_image_set(spec, "train")) == len(load_image_set(spec, "val")) == 10


@pytest.mark.parametrize(
    "name", ["MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100", "SVHN", "STL10"]
)
def test_missing_torchvision_files_say_where_was_looked(tmp_path, name):
    pytest.importorskip("scipy")
    with pytest.raises(DatasetError, match=f"{name}.*{tmp_path}"):
        load_image_set(spec_of("torchvision", tmp_path, name=name), "train")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="'ImageNet'.*CIFAR10"):
        load_image_set(spec_of("torchvision", tmp_path, name="ImageNet"), "train")
    with pytest.raises(DatasetError, match="split.*'training'.*train"):
        load_image_set(spec_of("digits"), "training")  # type: ignore[arg-type]


def test_usps(shared_data):
    spec = spec_of("npz", shared_data("usps.npz"), size=16, val_fraction=0.1)
    train, val, test = (load_image_set(spec, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) == 7291 and len(test) == 2007 and train.classes == list("0123456789")
    with np.load(shared_data("usps.npz")) as archive:
        assert np.array_equal(all_images(test)[:, 0].numpy(), archive["test_x"])
        assert np.array_equal(test.labels_N.numpy(), archive["test_y"])
    as_rgb = load_image_set(spec_of("npz", shared_data("usps.npz"), size=32, channels=3, limit=20), "test")
    assert all_images(as_rgb).shape == (20, 3, 32, 32)


@pytest.mark.parametrize(
    "name, size, classes",
    [("cifar10_jpg.npz", 32, 10), ("tinyimagenet32_100c_jpg.npz", 32, 100)],
)
def test_jpg_archives_decode_like_pil(shared_data, name, size, classes):
    image_module = pytest.importorskip("PIL.Image")
    path = shared_data(name)
    part = load_image_set(
        spec_of("jpg_npz", path, size=size, channels=3, limit=40, val_fraction=0.0), "train"
    )
    assert len(part.classes) == classes and len(part) == 40
    with np.load(path) as archive:
        data, offsets, labels = archive["train_bytes"], archive["train_offsets"], archive["train_y"]
    for i, image in enumerate(all_images(part)):
        file = io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())
        expected = np.asarray(image_module.open(file).convert("RGB")).transpose(2, 0, 1).astype(int)
        assert np.abs(image.numpy().astype(int) - expected).max() <= 4
        assert part.labels_N[i] == labels[i]


def test_domains_of_pacs(shared_data):
    spec = spec_of("jpg_npz", shared_data("pacs_jpg.npz"), size=32, channels=1, domains=["sketch"], limit=50)
    sketches = all_images(load_image_set(spec, "test"))
    photos = all_images(load_image_set(spec.model_copy(update={"domains": ["photo"]}), "test"))
    # Sketches are thin lines on white paper.
    assert sketches.float().mean() > 200 > photos.float().mean()


def test_the_photo_pool_is_refused(shared_data):
    with pytest.raises(DatasetError, match="no labels.*unlabelled"):
        load_image_set(spec_of("jpg_npz", shared_data("photos_ood_jpg.npz")), "train")
