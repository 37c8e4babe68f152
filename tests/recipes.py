"""Recipes and teachers small enough for tests: seconds on one core, and none of the parts degenerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.models.cards import Card, save_network
from dfkd_dist.models.registry import build_network

Tree = dict[str, Any]

CLASSES = 5
NAMES = [f"class_{c}" for c in range(CLASSES)]
ZOO = [
    {"arch": "tiny", "size": 8, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "classes": NAMES},
    # Another architecture, resolution, number of channels and class order.
    {"arch": "resnet8", "size": 10, "channels": 1, "mean": [0.3], "std": [0.3], "classes": NAMES[::-1]},
    {"arch": "wrn16_1", "size": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": NAMES},
]


def stir(network: nn.Module, seed: int) -> nn.Module:
    """Batch norms as after training (no mean of 0, no variance of 1), and logits that say something; in place."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                size = module.running_mean.shape
                module.running_mean.copy_(0.2 * torch.randn(size, generator=g))
                module.running_var.copy_(0.5 + torch.rand(size, generator=g))
                if module.affine:
                    module.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=g))
                    module.bias.copy_(0.2 * torch.randn(size, generator=g))
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=g) * 2.0 / last.in_features**0.5)
    return network


def write_teachers(folder: Path, count: int) -> list[Tree]:
    """`count` unlike teachers as files with cards; returns their sections of a recipe."""
    sections = []
    for k in range(count):
        torch.manual_seed(k)
        card = Card(num_classes=CLASSES, **ZOO[k % len(ZOO)])
        network = stir(build_network(card.arch, num_classes=CLASSES, in_channels=card.channels), seed=k)
        path = folder / f"teacher_{k}.safetensors"
        save_network(path, network.state_dict(), card)
        sections.append({"name": f"t{k}", "weights": str(path)})
    return sections


def random_teachers(count: int) -> list[Tree]:
    """Sections of teachers without files, for tests of everything but their answers."""
    archs = ["tiny", "resnet8", "tiny"]
    return [{"name": f"t{k}", "weights": "random", "arch": archs[k % 3]} for k in range(count)]


def merged(tree: Tree, changes: Tree) -> Tree:
    """A copy of `tree` with `changes` over it, section by section."""
    out = copy.deepcopy(tree)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def base(teachers: list[Tree], **changes: Any) -> Tree:
    """What all of them share; B does not divide by any number of ranks above one."""
    tree = {
        "name": "test",
        "method": "test",
        "image": {"size": 8, "channels": 3},
        "num_classes": CLASSES,
        "batch": 11,
        "rounds": {"warmup": 2, "main": 18, "student_steps": 1},
        "teachers": teachers,
        "student": {"arch": "tiny"},
        "optimizer": {"lr": 0.02},
        "precision": {"train": "fp64", "teacher": "fp64"},
        "source": {"kind": "generative", "generator": {"latent": 16, "width": 16, "blocks": 2}},
    }
    return merged(tree, changes)


def dfmf(teachers: list[Tree], **changes: Any) -> Tree:
    """Assistants, VID, augmentation and a warm-up: everything of DFMF."""
    source = {
        "loss": {"bn": 0.1, "ice": 0.2, "bce": 0.3, "adv": 1.0},
        "warmup_loss": {"bn": 1.0, "ice": 1.0, "bce": 1.0},
        "adversary": {"against": "assistant"},
        "assistant": {"steps": 1, "optimizer": {"lr": 0.02}},
    }
    tree = base(teachers, source=source, objective={"vid": 1.0})
    return merged(merged(tree, {"augment": {"rotation": 10.0, "crop_padding": 1, "flip": True}}), changes)


def dfq(teachers: list[Tree], batch_norm: str = "eval", **changes: Any) -> Tree:
    """The adversary is the student; weighted teachers."""
    source = {
        "loss": {"bn": 1.0, "ice": 0.5, "bce": 1.0, "adv": 1.0},
        "bn": {"form": "l2"},
        "adversary": {"against": "student", "batch_norm": batch_norm},
    }
    weighted = [section | {"weight": 1.0 + k} for k, section in enumerate(teachers)]
    return merged(base(weighted, source=source, optimizer={"weight_decay": 5e-4}), changes)


def dafl(teachers: list[Tree], **changes: Any) -> Tree:
    """The student trains on the very images that the generator step made."""
    source = {
        "loss": {"oh": 1.0, "bce": 5.0, "act": 0.1},
        "student_images": "from_update",
        "generator": {"head": "bn"},
        "optimizer": {"kind": "adam", "lr": 1e-3},
    }
    rounds = {"warmup": 0, "main": 5, "student_steps": 2}
    return merged(base(teachers, source=source, rounds=rounds, augment={"flip": True}), changes)


def zskt(teachers: list[Tree], **changes: Any) -> Tree:
    """One set of latents per round, attention transfer, reverse KL, the adversary in batch mode."""
    source = {
        "loss": {"adv": 1.0},
        "adversary": {"against": "student", "temperature": 1.0, "batch_norm": "batch"},
        "latents": "per_round",
        "generator": {"head": "bn"},
    }
    objective = {"at": 10.0, "temperature": 1.0, "kl_direction": "reverse", "target": "lowest_entropy"}
    rounds = {"warmup": 0, "main": 4, "student_steps": 3}
    return merged(base(teachers, source=source, objective=objective, rounds=rounds), changes)


def dfad(teachers: list[Tree], **changes: Any) -> Tree:
    """Student first, L1 on both sides."""
    source = {
        "loss": {"adv": 1.0},
        "adversary": {"against": "student", "form": "l1"},
        "student_first": True,
        "generator": {"head": "bn"},
    }
    objective = {"kl": 0.0, "l1": 1.0, "target": "mean_logits"}
    rounds = {"warmup": 0, "main": 5, "student_steps": 2}
    optimizer = {"clip": 1.0, "nesterov": True}
    schedule = {"kind": "multistep", "milestones": [0.3, 0.6]}
    changed = {"source": source, "objective": objective, "rounds": rounds, "optimizer": optimizer, "schedule": schedule}
    return merged(base(teachers, **changed), changes)


def labelled(folder: Path, **changes: Any) -> Tree:
    """Supervised training on images of noise."""
    g = torch.Generator().manual_seed(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 10)):
        arrays[f"{split}_x"] = torch.randint(0, 256, (count, 8, 8), generator=g, dtype=torch.uint8).numpy()
        arrays[f"{split}_y"] = (torch.arange(count) % CLASSES).numpy()
    np.savez(folder / "noise.npz", **arrays)
    dataset = {"kind": "npz", "path": str(folder / "noise.npz"), "size": 8, "channels": 1}
    tree = {
        "name": "test",
        "method": "supervised",
        "image": {"size": 8, "channels": 1},
        "num_classes": CLASSES,
        "batch": 11,
        "rounds": {"main": 10},
        "student": {"arch": "tiny"},
        "optimizer": {"lr": 0.02},
        "objective": {"kl": 0.0, "ce": 1.0},
        "precision": {"train": "fp64", "teacher": "fp64"},
        "augment": {"rotation": 10.0, "crop_padding": 1},
        "source": {"kind": "labelled", "dataset": dataset},
    }
    return merged(tree, changes)


def mosaic(teachers: list[Tree], shards: Path, **changes: Any) -> Tree:
    """Four players over real images, some of which the student sees too; batches do not divide by two or more ranks."""
    source = {
        "kind": "mosaic",
        "loss": {"patch": 1.0, "ice": 0.5, "bce": 2.0, "adv": 1.0},
        "discriminator": {"field": 8, "width": 6},
        "reader": {"shards": str(shards), "workers": 0, "window": 20},
        "ood_batch": 7,
        "ood_augment": {"rotation": 5.0, "crop_padding": 1, "flip": True},
    }
    objective = {"temperature": 1.0}
    rounds = {"warmup": 0, "main": 20, "student_steps": 2}
    return merged(base(teachers, source=source, objective=objective, rounds=rounds), changes)


def inversion(teachers: list[Tree], **changes: Any) -> Tree:
    """DeepInversion with all of its terms, two resolutions and a student beside; small shards, so that images spill.

    Batches do not divide by two or more ranks; the pool outgrows its memory in the third round of one teacher.
    """
    source = {
        "kind": "inversion",
        "batch": 7,
        "synthesis": {
            "kind": "deepinversion",
            "stages": [{"iterations": 2, "scale": 2, "jitter": 1}, {"iterations": 3, "jitter": 2}],
            "lr": 0.1,
            "schedule": "cosine",
            "warmup": 1,
            "flip": True,
            "clip": True,
            "loss": {"bn": 1.0, "tv": 1e-3, "tv_l1": 1e-2, "l2": 1e-3, "js": 2.0},
            "bn": {"first_layer": 10.0},
        },
        "pool": {"shard": 5, "memory_gb": 1e-6},
    }
    tree = base(
        teachers, rounds={"warmup": 1, "main": 4, "student_steps": 2}, augment={"crop_padding": 1, "flip": True}
    )
    return merged(tree | {"source": source}, changes)


def _latent(teachers: list[Tree], synthesis: Tree, **changes: Any) -> Tree:
    source = {
        "kind": "inversion",
        "batch": 7,
        "synthesis": {"generator": {"latent": 12, "width": 8, "blocks": 2}, **synthesis},
        "pool": {"shard": 5, "memory_gb": 1e-6},
    }
    tree = base(teachers, rounds={"warmup": 1, "main": 4, "student_steps": 2}, augment={"flip": True})
    return merged(tree | {"source": source}, changes)


def cmi(teachers: list[Tree], **changes: Any) -> Tree:
    """CMI with all of its terms; its bank is smaller than what is made, and an iteration draws a part of it."""
    synthesis = {
        "kind": "cmi",
        "iterations": 3,
        "lr": 0.02,
        "loss": {"bn": 1.0, "ce": 0.7, "oh": 0.3, "adv": 5.0, "cr": 0.8},
        "contrast": {"dim": 6, "bank": 17, "negatives": 11, "lr": 0.01},
        "global_view": {"crop_padding": 1},
    }
    return _latent(teachers, synthesis, **changes)


def cmi_with_assistants(teachers: list[Tree], **changes: Any) -> Tree:
    """DFMF's `CMI (w/ GA)`."""
    source = {
        "synthesis": {"adversary": {"against": "assistant"}},
        "assistant": {"steps": 2, "optimizer": {"lr": 0.02}},
    }
    return merged(merged(cmi(teachers), {"source": source}), changes)


def fast(teachers: list[Tree], **changes: Any) -> Tree:
    """Fast across its boundaries: the adversary from round 1 on, two rounds of warm-up, a reset in round 3."""
    synthesis = {
        "kind": "fast",
        "iterations": 3,
        "lr": 0.01,
        "lr_latents": 0.03,
        "loss": {"bn": 1.0, "ce": 0.5, "adv": 5.0},
        "adv_from": 1,
        "reset_at": 3,
        "view": {"crop_padding": 1},
    }
    rounds = {"warmup": 2, "main": 4}
    return merged(_latent(teachers, synthesis, rounds=rounds), changes)


def fast_of_imagenet(teachers: list[Tree], **changes: Any) -> Tree:
    """Latents that persist and are drawn anew in round 2, Reptile, the last images, no linear layer."""
    synthesis = {
        "generator": {"style": "spatial", "width": 8},
        "latents": "persistent",
        "redraw_every": 3,
        "meta": {"gradient": "reptile", "scale": 1.0, "lr": 0.01, "lr_latents": 0.02},
        "keep": "last",
        "view": {"crop_padding": 0, "resized_crop": 0.5},
    }
    return merged(fast(teachers, source={"synthesis": synthesis}), changes)
