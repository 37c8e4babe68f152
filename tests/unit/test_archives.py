"""Image sets in npz files: what is read, and errors that name file, key and finding."""

import numpy as np
import pytest
import torch

from dfkd_dist.data.datasets import DatasetError, load_image_set
from dfkd_dist.data.pixels import convert_images
from tests.image_data import all_images, pack, pictures, spec_of, write_domains, write_jpg_npz, write_npz


@pytest.mark.parametrize("layout", ["NHW", "NHW1", "NHW3"])
def test_npz_images_arrive_as_they_were(tmp_path, layout):
    images = pictures(10, 3 if layout == "NHW3" else 1, seed=1)
    stored = images[:, 0] if layout == "NHW" else images.permute(0, 2, 3, 1)
    path = write_npz(tmp_path / "set.npz", test_x=stored.numpy())
    loaded = load_image_set(spec_of("npz", path, channels=images.shape[1]), "test")
    assert torch.equal(all_images(loaded), images)
    assert loaded.labels_N.tolist() == [i % 5 for i in range(10)] and loaded.classes == list("01234")


def test_train_and_val_part_the_training_images(tmp_path):
    path = write_npz(tmp_path / "set.npz", train_x=np.arange(30, dtype=np.uint8).repeat(64).reshape(30, 8, 8))
    spec = spec_of("npz", path, val_fraction=0.34)
    train, val = load_image_set(spec, "train"), load_image_set(spec, "val")
    numbers = [all_images(part)[:, 0, 0, 0].tolist() for part in (train, val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(30))
    assert torch.bincount(val.labels_N).tolist() == [2] * 5
    assert val.labels_N.tolist() == [number % 5 for number in numbers[1]]
    limited = load_image_set(spec.model_copy(update={"limit": 3}), "train")
    assert all_images(limited)[:, 0, 0, 0].tolist() == numbers[0][:3]


def test_an_empty_validation_split_is_an_error(tmp_path):
    path = write_npz(tmp_path / "set.npz")
    with pytest.raises(DatasetError, match="set.npz.*'val' is empty.*val_fraction is 0"):
        load_image_set(spec_of("npz", path, val_fraction=0.0), "val")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_x": None}, "'train_x' is missing, found .'test_x', 'test_y', 'train_y'."),
        ({"train_y": None}, "'train_y' is missing"),
        ({"train_x": np.zeros((30, 8, 8), np.float32)}, "'train_x': expected uint8.*found float32"),
        ({"train_x": np.zeros((30, 64), np.uint8)}, r"'train_x'.*\[N, H, W\].*\(30, 64\)"),
        ({"train_x": np.zeros((30, 3, 8, 8), np.uint8)}, r"'train_x'.*\(30, 3, 8, 8\)"),
        ({"train_x": np.zeros((30, 0, 8), np.uint8)}, r"'train_x'.*pixels.*\(30, 0, 8\)"),
        ({"train_y": np.zeros(29, np.uint8)}, "'train_y'.*30 images, found 29"),
        ({"train_y": np.zeros(30)}, "'train_y'.*integer.*float64"),
        ({"train_y": np.zeros((30, 1), np.uint8)}, r"'train_y'.*\[N\].*\(30, 1\)"),
        ({"train_y": np.arange(30) - 1}, "'train_y'.*0 or more.*-1 .. 28"),
        ({"train_y": np.arange(30), "classes": np.array(["a", "b"])}, "'train_y'.*0 .. 1.*found 0 .. 29"),
        ({"classes": np.arange(5)}, "'classes'.*strings.*int64"),
        ({"train_x": np.array([{}] * 30)}, "'train_x'.*(pickle|object)"),
        ({"train_x": np.zeros((0, 8, 8), np.uint8), "train_y": np.zeros(0, np.uint8)}, "found"),
    ],
)
def test_npz_errors_name_file_key_and_finding(tmp_path, changes, words):
    path = write_npz(tmp_path / "set.npz", **changes)
    with pytest.raises(DatasetError, match=words) as caught:
        load_image_set(spec_of("npz", path), "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["npz", "jpg_npz"])
def test_what_is_no_archive_is_refused(tmp_path, kind):
    (tmp_path / "noise.npz").write_bytes(b"PK\x03\x04 this is no archive")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, words in [
        ("noise.npz", "not a readable"),
        ("single.npy", "single array"),
        ("none", "no such file"),
    ]:
        with pytest.raises(DatasetError, match=f"{name}.*{words}"):
            load_image_set(spec_of(kind, tmp_path / name), "train")


def test_a_damaged_archive_is_refused(tmp_path):
    path = write_npz(tmp_path / "set.npz")
    data = bytearray(path.read_bytes())
    data[600:640] = bytes(40)
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match="set.npz: key 'train_x' cannot be read"):
        load_image_set(spec_of("npz", path), "train")


def test_each_array_is_read_once(tmp_path, monkeypatch):
    from numpy.lib.npyio import NpzFile

    path, keys, read = write_npz(tmp_path / "set.npz"), [], NpzFile.__getitem__
    monkeypatch.setattr(NpzFile, "__getitem__", lambda self, key: keys.append(key) or read(self, key))
    load_image_set(spec_of("npz", path), "train")
    assert sorted(keys) == ["test_y", "train_x", "train_y"]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpg_npz_decodes_grey_and_colour(tmp_path, channels):
    loaded = load_image_set(
        spec_of("jpg_npz", write_jpg_npz(tmp_path / "jpg.npz"), channels=channels), "test"
    )
    originals = pictures(10, seed=10)
    for i, image in enumerate(all_images(loaded)):
        original = originals[i][:1].expand(3, -1, -1) if i % 3 == 0 else originals[i]
        expected = convert_images(original[None], size=8, channels=channels)[0]
        assert (image.int() - expected.int()).abs().max() <= 24, i
        assert (image.int() - expected.int()).abs().float().mean() <= 6, i
    assert loaded.classes == list("abcde") and loaded.channels == channels


def test_threads_decode_the_same(tmp_path):
    spec = spec_of("jpg_npz", write_jpg_npz(tmp_path / "jpg.npz"), channels=3)
    alone = all_images(load_image_set(spec, "train"))
    torch.set_num_threads(3)
    try:
        assert torch.equal(all_images(load_image_set(spec, "train")), alone)
    finally:
        torch.set_num_threads(1)


def test_a_corrupt_jpg_is_named_by_its_index(tmp_path):
    data, offsets = pack(list(pictures(20)))
    data[offsets[7] : offsets[8]] = 0
    path = write_jpg_npz(tmp_path / "jpg.npz", train_bytes=data, train_offsets=offsets)
    with pytest.raises(DatasetError, match="jpg.npz: image 7: not a readable image"):
        load_image_set(spec_of("jpg_npz", path, val_fraction=0.0), "train")


def test_photos_without_labels_are_refused(tmp_path):
    path = write_jpg_npz(tmp_path / "jpg.npz", train_y=None, test_y=None)
    with pytest.raises(DatasetError, match="jpg.npz.*no labels.*unlabelled stream"):
        load_image_set(spec_of("jpg_npz", path), "train")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_offsets": None}, "'train_offsets' is missing"),
        ({"train_offsets": np.array([0, 5, 3])}, "'train_offsets'.*rise within"),
        ({"train_offsets": np.array([-1, 5])}, "'train_offsets'.*rise within"),
        ({"train_offsets": np.array([0, 10**9])}, "'train_offsets'.*rise within"),
        ({"train_offsets": np.array([0.0, 5.0])}, "'train_offsets'.*integers.*float64"),
        ({"train_bytes": np.zeros(9, np.int64)}, "'train_bytes'.*uint8.*int64"),
        ({"train_y": np.zeros(3, np.uint8)}, "'train_y'.*20 images, found 3"),
        ({"train_y": np.full(20, 5)}, "'train_y'.*0 .. 4.*found 5 .. 5"),
    ],
)
def test_jpg_npz_errors_name_file_key_and_finding(tmp_path, changes, words):
    path = write_jpg_npz(tmp_path / "jpg.npz", **changes)
    with pytest.raises(DatasetError, match=words) as caught:
        load_image_set(spec_of("jpg_npz", path), "train")
    assert str(path) in str(caught.value)


def test_domains_filter_within_fixed_parts(tmp_path):
    path = write_domains(tmp_path / "domains.npz")
    sizes, images = {}, {}
    for domains in (None, ["photo"], ["sketch"], ["sketch", "photo"]):
        spec = spec_of("jpg_npz", path, domains=domains, val_fraction=0.25)
        for split in ("train", "val", "test"):
            part = load_image_set(spec, split)
            sizes[str(domains), split] = torch.bincount(part.labels_N, minlength=4).tolist()
            images[str(domains), split] = {image.numpy().tobytes() for image in all_images(part)}
    assert [sizes["None", split] for split in ("train", "val", "test")] == [[12] * 4, [4] * 4, [4] * 4]
    assert [sizes["['photo']", split] for split in ("train", "val", "test")] == [[6] * 4, [2] * 4, [2] * 4]
    for split in ("train", "val", "test"):
        photo, sketch = images["['photo']", split], images["['sketch']", split]
        assert not photo & sketch and photo | sketch == images["None", split]
        assert images["['sketch', 'photo']", split] == images["None", split]


def test_unknown_domains_are_named(tmp_path):
    path = write_domains(tmp_path / "domains.npz")
    with pytest.raises(DatasetError, match="domains.*'cartoon'.*'photo', 'sketch'"):
        load_image_set(spec_of("jpg_npz", path, domains=["cartoon", "photo"]), "train")
    with pytest.raises(DatasetError, match="domains: this file has none"):
        load_image_set(spec_of("jpg_npz", write_jpg_npz(tmp_path / "jpg.npz"), domains=["a"]), "train")
    with pytest.raises(DatasetError, match="domains: only kind jpg_npz"):
        load_image_set(spec_of("digits", domains=["a"]), "train")
