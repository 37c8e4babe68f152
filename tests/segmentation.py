"""Sets with labelled pixels, networks and recipes for segmentation: seconds on one core, no part degenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.io import encode_jpeg, encode_png, write_png

from dfkd_dist.data.mask_set import IGNORE, MaskSet
from dfkd_dist.models.cards import Card, save_network
from dfkd_dist.models.registry import build_network
from tests.image_data import pictures
from tests.recipes import Tree, merged

SHAPES = ["background", "bar", "square", "frame"]
CLASSES = 5
NAMES = [f"class_{c}" for c in range(CLASSES)]
SEGMENTERS = [
    {"arch": "tinyseg", "size": 8, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "classes": NAMES},
    # Another architecture, resolution, number of channels and class order.
    {"arch": "smallseg", "size": 10, "channels": 1, "mean": [0.3], "std": [0.3], "classes": NAMES[::-1]},
]


def shapes(count: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, S, S]` of noise, each with one of three coloured figures, and their masks `[N, S, S]`; uint8."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (count, 3, size, size), generator=g, dtype=torch.uint8)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    for n in range(count):
        kind, side = 1 + n % 3, size // 2
        top, left = torch.randint(0, size - side + 1, (2,), generator=g).tolist()
        figure = torch.zeros(size, size, dtype=torch.bool)
        figure[top : top + (side // 3 if kind == 1 else side), left : left + side] = True
        if kind == 3:
            figure[top + 2 : top + side - 2, left + 2 : left + side - 2] = False
        masks[n][figure] = kind
        images[n, kind - 1][figure] = 220
    return images, masks


def write_shapes(root: Path, train: int = 48, test: int = 24, size: int = 16, ignore: bool = True) -> Path:
    """The layout of `kind: masks`: root/{train,test}/{image,label}; the outermost rows are labelled as ignored."""
    for seed, (part, count) in enumerate((("train", train), ("test", test))):
        images, masks = shapes(count, size, seed)
        if ignore:
            masks[:, :1] = IGNORE
        for name in ("image", "label"):
            (root / part / name).mkdir(parents=True)
        for n in range(count):
            write_png(images[n], str(root / part / "image" / f"{n:04d}.png"))
            write_png(masks[n][None], str(root / part / "label" / f"{n:04d}.png"))
    return root


def shapes_spec(root: Path, **changes: Any) -> Tree:
    """A dataset section for it."""
    return {"kind": "masks", "path": str(root), "size": 16, "channels": 3, "classes": SHAPES, **changes}


def mask_set(count: int, classes: list[str] = NAMES, size: int = 8) -> MaskSet:
    """Images with labels of all classes, some ignored, in no simple order."""
    g = torch.Generator().manual_seed(3)
    masks = torch.randint(0, CLASSES, (count, size, size), generator=g, dtype=torch.uint8)
    masks[torch.rand(count, size, size, generator=g) < 0.1] = IGNORE
    return MaskSet(pictures(count, height=size, width=size), masks, classes)


def write_file(path: Path, image_CHW: Tensor) -> None:
    """png or jpg by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = encode_png(image_CHW) if path.suffix == ".png" else encode_jpeg(image_CHW, quality=95)
    path.write_bytes(encoded.numpy().tobytes())


def stir(network: nn.Module, seed: int) -> nn.Module:
    """As `tests.recipes.stir`, for networks that end in a convolution."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                size = module.num_features
                module.running_mean.copy_(0.2 * torch.randn(size, generator=g))  # type: ignore[union-attr]
                module.running_var.copy_(0.5 + torch.rand(size, generator=g))  # type: ignore[union-attr]
                module.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=g))
                module.bias.copy_(0.2 * torch.randn(size, generator=g))
        last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=g) * 2.0 / last.in_channels**0.5)
    return network


def write_teachers(folder: Path, count: int) -> list[Tree]:
    """`count` unlike teachers as files with cards; returns their sections of a recipe."""
    sections = []
    for k in range(count):
        torch.manual_seed(k)
        card = Card(num_classes=CLASSES, **SEGMENTERS[k % len(SEGMENTERS)])  # type: ignore[arg-type]
        network = stir(build_network(card.arch, num_classes=CLASSES, in_channels=card.channels), seed=k)
        path = folder / f"segmenter_{k}.safetensors"
        save_network(path, network.state_dict(), card)
        sections.append({"name": f"t{k}", "weights": str(path)})
    return sections


def base(teachers: list[Tree], **changes: Any) -> Tree:
    """What they share; B does not divide by any number of ranks above one."""
    tree = {
        "name": "test",
        "method": "test",
        "image": {"size": 8, "channels": 3},
        "num_classes": CLASSES,
        "batch": 7,
        "rounds": {"main": 4, "student_steps": 2},
        "teachers": teachers,
        "student": {"arch": "tinyseg"},
        "optimizer": {"lr": 0.02},
        "precision": {"train": "fp64", "teacher": "fp64"},
        "source": {"kind": "generative", "generator": {"latent": 16, "width": 16, "blocks": 2}},
    }
    return merged(tree, changes)


def dfad(teachers: list[Tree], **changes: Any) -> Tree:
    """L1 for the student, -log(L1 + 1) for a DCGAN-style generator, the student first."""
    source = {
        "loss": {"adv": 1.0},
        "adversary": {"against": "student", "form": "log_l1", "batch_norm": "batch"},
        "student_first": True,
        "generator": {"style": "dcgan"},
    }
    return merged(base(teachers, source=source, objective={"kl": 0.0, "l1": 1.0}), changes)


def dafl(teachers: list[Tree], **changes: Any) -> Tree:
    """Every term that a teacher of pixels serves, and maps for the student."""
    source = {
        "loss": {"oh": 1.0, "ice": 0.5, "bce": 5.0, "act": 0.1, "bn": 0.2, "adv": 0.3},
        "adversary": {"against": "student", "form": "masked_kl"},
    }
    objective = {"kl": 1.0, "vid": 0.5, "at": 2.0, "target": "lowest_entropy"}
    return merged(base(teachers, source=source, objective=objective, augment={"flip": True}), changes)


def supervised(root: Path, **changes: Any) -> Tree:
    """From labels of pixels."""
    tree = base([], batch=12, rounds={"main": 12, "student_steps": 1}, objective={"kl": 0.0, "ce": 1.0})
    tree |= {"image": {"size": 16, "channels": 3}, "num_classes": len(SHAPES)}
    tree["source"] = {"kind": "labelled", "dataset": shapes_spec(root)}
    tree["augment"] = {"flip": True, "crop_padding": 2, "rotation": 20.0}
    return merged(tree, changes)


def kd(root: Path, teachers: list[Tree], **changes: Any) -> Tree:
    """Pixel-wise distillation on labelled images whose labels are not used."""
    tree = base(teachers, batch=11, rounds={"main": 6, "student_steps": 1}, objective={"temperature": 2.0})
    classes = [*SHAPES, "other"]
    tree["source"] = {"kind": "labelled", "dataset": shapes_spec(root, size=8, classes=classes)}
    return merged(tree, changes)


def numbers(mask_HW: Tensor) -> np.ndarray:
    """As an array."""
    return mask_HW.numpy().astype(np.int64)
