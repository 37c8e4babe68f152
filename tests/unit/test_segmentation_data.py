"""Readers of sets with labelled pixels, the drawn set, and labels that move with their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import write_png

from dfkd_dist.config import AugmentSpec, DatasetSpec, LabelledSpec, RecipeError, SplitSpec
from dfkd_dist.data.augment import augment, augment_labels, num_uniforms, windows
from dfkd_dist.data.datasets import DatasetError, MaskSet, Split, load_image_set
from dfkd_dist.data.mask_set import IGNORE, mask_to_square
from dfkd_dist.data.pixels import to_square
from dfkd_dist.engine.build import party_shares
from tests.image_data import pictures, write_jpg_npz, write_npz
from tests.segmentation import SHAPES, mask_set, shapes, shapes_spec, write_file, write_shapes


def load(root: Path, split: Split = "train", **changes: Any) -> MaskSet:
    found = load_image_set(DatasetSpec(**shapes_spec(root, **changes)), split)
    assert isinstance(found, MaskSet)
    return found


def all_of(images: MaskSet) -> tuple[Tensor, Tensor]:
    everything = torch.arange(len(images))
    return images.images(everything), images.labels(everything)


# ---------------------------------------------------------------------------------------------- kind: masks


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=10, test=6)
    for seed, split, count in ((0, "train", 10), (1, "test", 6)):
        found = load(root, split, val_fraction=0.0)  # type: ignore[arg-type]
        images, masks = shapes(count, seed=seed)
        masks[:, :1] = IGNORE
        pixels, labels = all_of(found)
        assert torch.equal(pixels, images) and torch.equal(labels, masks.long()) and labels.dtype == torch.int64
        assert (found.classes, found.size, found.channels, found.of_pixels) == (SHAPES, 16, 3, True)
        assert len(found) == count


def test_validation_images_are_carved_out_or_have_their_folder(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=20, test=4)
    train, val = load(root, "train", val_fraction=0.25), load(root, "val", val_fraction=0.25)
    assert (len(train), len(val)) == (15, 5)
    both = torch.cat([all_of(train)[0], all_of(val)[0]]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 20
    (root / "test").rename(root / "val")
    assert len(load(root, "val")) == 4 and len(load(root, "train")) == 20
    with pytest.raises(DatasetError, match="test/image: no such folder"):
        load(root, "test")


def test_offset_names_of_folders_and_whatever_holds_numbers(tmp_path: Path) -> None:
    """0 as "unlabelled", floats with -1, 16 bits: as the common preprocessings of NYUv2 keep them."""
    images = pictures(4, height=6, width=6)
    labels = torch.randint(0, 4, (4, 6, 6), generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "train"
    for n, suffix in enumerate((".png", ".jpg", ".npy", ".npy")):
        path = folder / "image" / f"a{n}{suffix}"
        if suffix != ".npy":
            write_file(path, images[n])
        else:
            hwc = images[n].permute(1, 2, 0).numpy()
            np.save(path, hwc if n == 2 else hwc.astype(np.float32) / 255)
    (folder / "seg13").mkdir()
    write_png((labels[0] + 1).to(torch.uint8)[None], str(folder / "seg13" / "a0.png"))
    Image.fromarray((labels[1] + 1).numpy().astype(np.uint16)).save(folder / "seg13" / "a1.png")
    shifted = (labels[2] + 1).double()
    shifted[0] = -1
    np.save(folder / "seg13" / "a2.npy", shifted.numpy())
    zero = (labels[3] + 1).clone()
    zero[1], zero[2] = 0, 255
    np.save(folder / "seg13" / "a3.npy", zero.numpy())
    found = load(tmp_path, labels="seg13", offset=1, size=6, val_fraction=0.0)
    pixels, read = all_of(found)
    expected = labels.clone()
    expected[2, 0], expected[3, 1], expected[3, 2] = IGNORE, IGNORE, IGNORE
    assert torch.equal(read, expected)
    assert torch.equal(pixels[[0, 2, 3]], images[[0, 2, 3]])
    assert (pixels[1].int() - images[1].int()).abs().max() < 30  # jpg


def test_labels_change_size_and_place_with_their_image(tmp_path: Path) -> None:
    height, width = 24, 40
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[:, 20:] = 1
    mask[12:, :] += 2
    write_file(tmp_path / "train" / "image" / "x.png", (mask * 80)[None].repeat(3, 1, 1))
    (tmp_path / "train" / "label").mkdir()
    write_png(mask[None], str(tmp_path / "train" / "label" / "x.png"))
    for size in (8, 12, 24, 48):
        pixels, labels = all_of(load(tmp_path, size=size, val_fraction=0.0))
        # The image shows its own labels; between regions bilinear values lie between.
        shown = pixels[0, 0].double() / 80
        assert ((shown - labels[0]).abs() < 0.5).double().mean() > 0.8, size
        inner = (shown - shown.round()).abs() < 1e-9
        assert torch.equal(shown.round().long()[inner], labels[0][inner]), size


def test_a_mask_is_cut_like_its_image() -> None:
    for height, width in ((7, 12), (12, 7), (9, 9), (5, 64)):
        coded = torch.arange(height * width, dtype=torch.float32).view(height, width)
        for size in (height, width, 5):
            image = to_square(coded[None, None], size)
            mask = mask_to_square(coded.long(), size)
            assert mask.shape == image.shape[2:]
            if min(height, width) == size:
                assert torch.equal(mask, image[0, 0].long())


def _bad(root: Path, what: str) -> dict[str, Any]:
    label, image = root / "train" / "label", root / "train" / "image"
    first = next(iter(sorted(label.iterdir())))
    match what:
        case "no folder":
            label.rename(root / "train" / "elsewhere")
        case "no images":
            for path in image.iterdir():
                path.unlink()
        case "no label":
            first.unlink()
        case "another size":
            write_png(torch.zeros(1, 8, 8, dtype=torch.uint8), str(first))
        case "colour":
            write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(first))
        case "a label too high":
            write_png(torch.full((1, 16, 16), 9, dtype=torch.uint8), str(first))
        case "fractions":
            np.save(first.with_suffix(".npy"), np.full((16, 16), 0.5))
            first.unlink()
        case "a list of objects":
            np.save(first.with_suffix(".npy"), np.array([{}]), allow_pickle=True)
            first.unlink()
        case "torn":
            first.write_bytes(first.read_bytes()[:40])
        case "torn image":
            path = image / first.name
            path.write_bytes(path.read_bytes()[:60])
        case "floats above one":
            np.save((image / first.name).with_suffix(".npy"), np.full((16, 16, 3), 200.0))
            (image / first.name).unlink()
    return {}


BAD = {
    "no folder": "train/label: no such folder",
    "no images": "found no images",
    "no label": "no map of labels for 1 of 4 images, such as 0000.png",
    "another size": r"\(8, 8\) pixels, but its image has \(16, 16\)",
    "colour": "colour type 2 with 8 bits; allowed: grey",
    "a label too high": "found label 9; allowed: 0 .. 3 .* and 255",
    "fractions": "whole numbers, found fractions",
    "a list of objects": "not a readable map of labels",
    "torn": "not a readable map of labels",
    "torn image": "not a readable image",
    "floats above one": r"expected floats in 0 .. 1, found 200",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path: Path, what: str) -> None:
    root = write_shapes(tmp_path / "set", train=4, test=1)
    _bad(root, what)
    with pytest.raises(DatasetError, match=BAD[what]) as caught:
        load(root, val_fraction=0.0)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "masks", "path": "x"}, "needs `classes`"),
        ({"kind": "digits_on_photos", "path": "x"}, "needs `photos`"),
        ({"kind": "digits", "offset": 1}, "offset is a key of kind: masks, found kind: digits"),
        ({"kind": "npz", "path": "x", "photos": "y"}, "photos is a key of kind: digits_on_photos"),
        ({"kind": "masks", "classes": ["a", "b"]}, "needs `path`"),
    ],
)
def test_keys_belong_to_kinds(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetSpec(size=8, channels=3, **keys)


# -------------------------------------------------------------------------------------------- the set itself


def test_a_set_of_masks_checks_what_it_is_given() -> None:
    images, masks = pictures(2), torch.zeros(2, 8, 8, dtype=torch.uint8)
    MaskSet(images, masks, ["a", "b"])
    for wrong in (masks[:1], masks.long(), masks[:, :4]):
        with pytest.raises(ValueError, match="expected uint8 squares of one size"):
            MaskSet(images, wrong, ["a", "b"])
    with pytest.raises(ValueError, match=r"0 .. 1 or 255, found \[7\]"):
        MaskSet(images, masks + 7, ["a", "b"])


def test_images_of_such_a_set_have_no_class_of_their_own() -> None:
    with pytest.raises(ValueError, match="it is for segmentation"):
        _ = mask_set(2).labels_N


def test_parties_share_images_evenly_and_not_by_class() -> None:
    shares = party_shares(mask_set(10), SplitSpec(parties=3))
    assert sorted(len(share) for share in shares) == [3, 3, 4]
    assert torch.cat(shares).sort().values.tolist() == list(range(10))
    with pytest.raises(RecipeError, match="split.mode is ibl"):
        party_shares(mask_set(10), SplitSpec(mode="ibl", parties=3, ratio=2.0))


# ------------------------------------------------------------------------------------------ digits on photos


def drawn(folder: Path, split: Split = "train", **changes: Any) -> MaskSet:
    archive = folder / "digits.npz"
    if not archive.exists():
        write_npz(archive)
        with np.load(archive) as known:
            glyphs = {f"{p}_x": np.where(known[f"{p}_x"] > 100, 255, 0).astype(np.uint8) for p in ("train", "test")}
        write_npz(archive, **glyphs)
        write_jpg_npz(folder / "photos.npz", photo_id=np.arange(20) // 2)
    keys = {"size": 12, "channels": 3, "limit": 40, **changes}
    spec = DatasetSpec(kind="digits_on_photos", path=str(archive), photos=str(folder / "photos.npz"), **keys)
    found = load_image_set(spec, split)
    assert isinstance(found, MaskSet)
    return found


def test_the_drawn_set_is_always_the_same_and_a_prefix_of_itself(tmp_path: Path) -> None:
    images, masks = all_of(drawn(tmp_path))
    again, fewer = all_of(drawn(tmp_path)), all_of(drawn(tmp_path, limit=7))
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert torch.equal(images[:7], fewer[0]) and torch.equal(masks[:7], fewer[1])
    assert not torch.equal(images, all_of(drawn(tmp_path, "test"))[0])
    assert len(torch.unique(images.flatten(1), dim=0)) == 40


def test_the_drawn_labels_are_where_the_digits_are(tmp_path: Path) -> None:
    found = drawn(tmp_path)
    images, masks = all_of(found)
    assert found.classes[0] == "background" and found.classes[1:] == [str(d) for d in range(10)]
    present = torch.unique(masks).tolist()
    assert present[0] == 0 and len(present) > 3 and max(present) <= 5  # the archive has five classes
    assert all(len(torch.unique(mask)) <= 2 for mask in masks)
    # Digits are light on dark photographs or dark on light ones, and there they cover the photograph.
    covered = masks > 0
    shade = images.double().mean(dim=1) / 255
    apart = [(abs(s[c].mean() - s[~c].mean())).item() for s, c in zip(shade, covered, strict=True) if c.any()]
    assert sum(apart) / len(apart) > 0.2


def test_photographs_for_testing_are_others(tmp_path: Path) -> None:
    drawn(tmp_path)
    photos = tmp_path / "photos.npz"
    with np.load(photos) as known:
        arrays = dict(known)
    np.savez(photos, **arrays | {"photo_id": np.ones(20, dtype=np.int64)})
    assert len(drawn(tmp_path)) == 40
    with pytest.raises(DatasetError, match="no photograph is left for test"):
        drawn(tmp_path, "test")
    np.savez(photos, **arrays | {"photo_id": np.ones(3)})
    with pytest.raises(DatasetError, match="photo_id': expected 20 integers"):
        drawn(tmp_path)


def test_grey_images_of_the_drawn_set(tmp_path: Path) -> None:
    grey, colour = drawn(tmp_path, channels=1), drawn(tmp_path)
    assert grey.channels == 1 and torch.equal(all_of(grey)[1], all_of(colour)[1])


def test_real_digits_on_real_photographs(shared_data: Any) -> None:
    files = {"path": str(shared_data("mnist.npz")), "photos": str(shared_data("photos_ood_jpg.npz"))}
    spec = DatasetSpec(kind="digits_on_photos", size=32, channels=3, limit=200, **files)
    images, masks = all_of(load_image_set(spec, "test"))  # type: ignore[arg-type]
    share = torch.bincount(masks.flatten(), minlength=11).double() / masks.numel()
    assert images.shape == (200, 3, 32, 32) and 0.75 < share[0] < 0.95 and share[1:].min() > 0.002


# --------------------------------------------------------------------------------------------- augmentation


GEOMETRY = AugmentSpec(crop_padding=3, flip=True)


def coded(count: int = 12, size: int = 9) -> tuple[Tensor, Tensor]:
    """Labels, and images that show them: (label + 1) / 256, exact in binary."""
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 200, (count, size, size), generator=g)
    masks[0, 2] = IGNORE
    return ((masks + 1).double() / 256).unsqueeze(1), masks


def uniforms(count: int, spec: AugmentSpec, seed: int = 1) -> Tensor:
    return torch.rand(count, num_uniforms(spec), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "spec",
    [GEOMETRY, AugmentSpec(flip=True), AugmentSpec(crop_padding=4), AugmentSpec(rotation=180.0, crop_padding=1)],
    ids=["crop and flip", "flip", "crop", "half a turn"],
)
def test_labels_move_with_their_image(spec: AugmentSpec) -> None:
    images, masks = coded()
    draws = uniforms(len(masks), spec)
    if spec.rotation:
        draws[:, 0] = 0.0  # -180 degrees, on which no pixel lies between others
    moved = augment(images, draws, spec)
    labels = augment_labels(masks, draws, spec)
    shown = (moved[:, 0] * 256).round().long() - 1
    assert torch.equal(torch.where(shown < 0, IGNORE, shown), labels)
    assert not torch.equal(labels, masks) and (labels == IGNORE).any() or spec == AugmentSpec(flip=True)


def test_turned_labels_are_those_of_the_nearest_pixel() -> None:
    size, spec = 33, AugmentSpec(rotation=40.0)
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = ((xs > 16).long() + 2 * (ys > 16).long()).expand(8, size, size).clone()
    images = torch.nn.functional.one_hot(masks, 4).movedim(-1, 1).double()
    draws = uniforms(8, spec)
    labels, shares = augment_labels(masks, draws, spec), augment(images, draws, spec)
    inside = shares.sum(dim=1) > 0.999
    assert torch.equal(labels[inside] == IGNORE, torch.zeros_like(labels[inside], dtype=torch.bool))
    assert (labels[shares.sum(dim=1) < 1e-9] == IGNORE).all()
    clear = inside & (shares.amax(dim=1) > 0.999)
    assert clear.double().mean() > 0.5 and torch.equal(shares.argmax(dim=1)[clear], labels[clear])


def test_colour_leaves_labels_alone() -> None:
    spec = AugmentSpec(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2)
    _, masks = coded()
    assert torch.equal(augment_labels(masks, uniforms(len(masks), spec), spec), masks)


def test_windows_are_squares_of_the_image_at_drawn_places() -> None:
    size, count = 5, 400
    images = torch.arange(8.0 * 9).view(1, 1, 8, 9).expand(count, 2, 8, 9)
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = windows(images, draws, size)
    tops, lefts = (draws[:, 0] * 4).long(), (draws[:, 1] * 5).long()
    for n in range(0, count, 7):
        expected = images[n, :, tops[n] : tops[n] + size, lefts[n] : lefts[n] + size]
        assert torch.equal(cut[n], expected)
    assert len(torch.unique(cut[:, 0, 0, 0])) == 4 * 5  # every place occurs
    assert torch.equal(
        windows(images, torch.full((count, 2), 1 - 1e-17, dtype=torch.float64), size)[0, 0, -1, -1],
        images[0, 0, -1, -1],
    )
    whole = images[..., :8]
    assert torch.equal(windows(whole, draws, 8), whole)


def test_a_crop_larger_than_the_images_is_refused() -> None:
    dataset = {"kind": "digits", "size": 8, "channels": 1}
    with pytest.raises(ValueError, match="crop is 9, but dataset.size is 8"):
        LabelledSpec(kind="labelled", dataset=DatasetSpec(**dataset), crop=9)
