"""Small image sets that tests write to disk: arrays, jpg archives and folders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_jpeg, encode_png

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.datasets import ImageSet


def spec_of(kind: str, path: object = None, **keys: Any) -> DatasetSpec:
    """A spec with small defaults."""
    values = {"size": 8, "channels": 1, **keys}
    return DatasetSpec(kind=kind, path=None if path is None else str(path), **values)


def pictures(count: int, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Smooth random uint8 images, which jpg keeps nearly unchanged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def write_npz(path: Path, **changes: Any) -> Path:
    """A valid grey archive of 30 + 10 images in 5 classes; `changes` replace arrays (None leaves one out)."""
    arrays = {
        "train_x": pictures(30, 1)[:, 0].numpy(),
        "train_y": np.arange(30, dtype=np.uint8) % 5,
        "test_x": pictures(10, 1, seed=1)[:, 0].numpy(),
        "test_y": np.arange(10, dtype=np.uint8) % 5,
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def pack(images: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Jpg files laid back to back, and their offsets."""
    files = [encode_jpeg(image, quality=95).numpy() for image in images]
    return np.concatenate(files), np.cumsum([0, *map(len, files)]).astype(np.int64)


def write_jpg_npz(path: Path, **changes: Any) -> Path:
    """A valid jpg archive of 20 + 10 images in 5 classes; every third image is a grey jpg."""
    arrays: dict[str, Any] = {"classes": np.array(list("abcde"))}
    for part, count in (("train", 20), ("test", 10)):
        images = [image[:1] if i % 3 == 0 else image for i, image in enumerate(pictures(count, seed=count))]
        arrays[f"{part}_bytes"], arrays[f"{part}_offsets"] = pack(images)
        arrays[f"{part}_y"] = np.arange(count, dtype=np.uint8) % 5
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_domains(path: Path, **changes: Any) -> Path:
    """A jpg archive without a split: 4 classes x 2 domains x 10 images."""
    data, offsets = pack(list(pictures(80)))
    number = np.arange(80)
    arrays = {
        "x_bytes": data,
        "x_offsets": offsets,
        "y": number % 4,
        "domain": number // 4 % 2,
        "classes": np.array(list("abcd")),
        "domains": np.array(["photo", "sketch"]),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_folder(root: Path, per_class: dict[str, int], *, seed: int = 0) -> Path:
    """root/class/00.png, .jpg, .JPEG in turn, 12 x 16 pixels."""
    for name, count in per_class.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(pictures(count, height=12, width=16, seed=seed + len(name))):
            suffix = (".png", ".jpg", ".JPEG")[i % 3]
            encoded = encode_png(image) if suffix == ".png" else encode_jpeg(image, quality=95)
            (root / name / f"{i:02d}{suffix}").write_bytes(encoded.numpy().tobytes())
    return root


def all_images(image_set: ImageSet) -> torch.Tensor:
    """Every image of a set."""
    return image_set.images(torch.arange(len(image_set)))
