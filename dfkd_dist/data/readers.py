"""Image sets from scikit-learn's digits, from a folder of image files and from torchvision's data sets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import FileImageSet, MemoryImageSet
from dfkd_dist.data.part import Part, Split, read_labels, train_or_test
from dfkd_dist.data.pixels import convert_images

DIGITS_TEST_FRACTION = 0.4
SUFFIXES = (".jpg", ".jpeg", ".png")

_BY_TRAIN_FLAG = ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100")
_BY_SPLIT_NAME = ("SVHN", "STL10")
TORCHVISION_SETS = (*_BY_TRAIN_FLAG, *_BY_SPLIT_NAME)


def read_digits(spec: DatasetSpec, split: Split) -> Part:
    """scikit-learn's 1,797 grey 8 x 8 digits, 0 .. 16 spread over 0 .. 255; 40% of each class are test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels_N = torch.from_numpy(digits.target.astype(np.int64))
    positions = train_or_test(labels_N, split, DIGITS_TEST_FRACTION)
    make = _in_memory(spec, torch.from_numpy(images_NHW)[:, None], labels_N, [str(i) for i in range(10)])
    return Part(positions, labels_N, [str(i) for i in range(10)], make, carve=split != "test")


def read_folder(spec: DatasetSpec, split: Split) -> Part:
    """Image files in root/{train,val,test}/class/ (val may be missing) or in root/class/.

    Without split folders a fixed fifth of each class is for testing. Class names are the sorted folder names.
    Images come one of each class in turn, so that the first n are balanced.
    """
    root = Path(str(spec.path))
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    if not any((root / part).is_dir() for part in ("train", "test")):
        part = _folder_part(spec, root, _class_names(root), carve=split != "test")
        return Part(train_or_test(part.labels_N, split), part.labels_N, part.classes, part.make, carve=part.carve)
    carve = split == "train" or (split == "val" and not (root / "val").is_dir())
    folder = root / ("train" if carve else split)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; found {sorted(p.name for p in root.iterdir())}")
    # With a validation folder nothing is taken out of the train folder.
    carve = carve and not (root / "val").is_dir()
    classes = _class_names(root / "train" if (root / "train").is_dir() else folder)
    return _folder_part(spec, folder, classes, carve=carve)


def _folder_part(spec: DatasetSpec, folder: Path, classes: list[str], *, carve: bool) -> Part:
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise DatasetError(f"{folder}: found classes {unknown} that the train folder has not; allowed are {classes}")
    by_class = [_image_files(folder / name, label) for label, name in enumerate(classes)]
    files = [item for item in chain.from_iterable(zip_longest(*by_class)) if item is not None]
    if not files:
        raise DatasetError(f"{folder}: found no images in class folders; allowed are files in {SUFFIXES}")
    paths = [path for path, _ in files]
    labels_N = torch.tensor([label for _, label in files], dtype=torch.int64)

    def make(positions: Tensor) -> FileImageSet:
        chosen = [paths[i] for i in positions.tolist()]
        return FileImageSet(chosen, labels_N[positions], classes, size=spec.size, channels=spec.channels)

    return Part(torch.arange(len(paths)), labels_N, classes, make, carve=carve)


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path, label: int) -> list[tuple[str, int]]:
    files = folder.rglob("*") if folder.is_dir() else iter(())
    return sorted((str(path), label) for path in files if path.suffix.lower() in SUFFIXES)


def read_torchvision(spec: DatasetSpec, split: Split) -> Part:
    """One of torchvision's sets by name, from files that are already under `path` (nothing is downloaded).

    torchvision checks the files of CIFAR against known checksums before it unpickles them.
    """
    part = "test" if split == "test" else "train"
    images_NCHW, labels_N, classes = torchvision_arrays(str(spec.name), str(spec.path), part)
    make = _in_memory(spec, images_NCHW, labels_N, classes)
    return Part(torch.arange(len(labels_N)), labels_N, classes, make, carve=part == "train")


def torchvision_arrays(name: str, root: str, part: str) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 images `[N, 1 or 3, H, W]`, int64 labels and class names of a torchvision set; part: train or test."""
    data = _open_torchvision(name, root, part)
    images_NCHW = _channels_first(np.asarray(data.data))
    labels = np.asarray(data.labels if hasattr(data, "labels") else data.targets)
    names = getattr(data, "classes", None)
    where = f"{root}: torchvision's {name}, {part} labels"
    labels_N = read_labels(where, labels, len(images_NCHW), None if names is None else len(names))
    classes = [str(i) for i in range(10)] if names is None else [str(name) for name in names]
    return images_NCHW, labels_N, classes


def _open_torchvision(name: str, root: str, part: str) -> Any:
    from torchvision import datasets

    if name not in TORCHVISION_SETS:
        raise DatasetError(f"name: found {name!r}, allowed are {sorted(TORCHVISION_SETS)}")
    how: dict[str, Any] = {"split": part} if name in _BY_SPLIT_NAME else {"train": part == "train"}
    try:
        return getattr(datasets, name)(root=root, download=False, **how)
    except (RuntimeError, OSError) as error:
        where = Path(root).resolve()
        raise DatasetError(
            f"torchvision's {name} ({part}) was looked for under {where} and cannot be read: {error} "
            "(dfkd_dist downloads nothing; put the files where torchvision would)"
        ) from error


def _channels_first(images: np.ndarray[Any, Any]) -> Tensor:
    """Grey NHW, NHWC or NCHW to NCHW."""
    tensor = torch.from_numpy(images)
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor.permute(0, 3, 1, 2) if tensor.shape[3] == 3 else tensor


def _in_memory(
    spec: DatasetSpec, images_NCHW: Tensor, labels_N: Tensor, classes: list[str]
) -> Callable[[Tensor], MemoryImageSet]:
    def make(positions: Tensor) -> MemoryImageSet:
        converted = convert_images(images_NCHW[positions], size=spec.size, channels=spec.channels)
        return MemoryImageSet(converted, labels_N[positions], classes)

    return make
