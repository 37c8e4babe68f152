"""What people get wrong: refused before any work, in one message that helps, with nothing half-written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from dfkd_dist.cli import main
from dfkd_dist.engine.checks import agreed
from dfkd_dist.engine.entry import EXIT_REFUSED
from dfkd_dist.models import registry
from dfkd_dist.models.weights import load_state, save_weights
from dfkd_dist.parallel.group import ALONE, Group
from tests.recipes import NAMES, Tree, dfmf, merged, write_teachers

Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], Tree]
"""From a folder with two teachers (spoiling a file perhaps) to what changes in the recipe."""


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content; directories count too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refusal(capsys: Capture, folder: Path, *argv: str | Path) -> str:
    """What `dfkd argv` says; it must be refused, and leave the folder as it was."""
    before = listing(folder)
    capsys.readouterr()
    code = main([str(a) for a in argv])
    said = capsys.readouterr()
    assert code == EXIT_REFUSED, said.out + said.err
    assert said.err.startswith("error: ") and said.err.count("error: ") == 1 and said.out == ""
    assert "Traceback" not in said.err
    assert listing(folder) == before
    return said.err


def recipe_file(folder: Path, **changes: Any) -> Path:
    """DFMF with two teachers of 5 classes and a run directory `folder`/run."""
    tree = merged(dfmf(write_teachers(folder, 2), out=str(folder / "run")), changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def spoil(folder: Path, change: Change) -> Path:
    """`recipe_file`, then the change on top."""
    path = recipe_file(folder)
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), change(folder))))
    return path


def card(folder: Path, **changes: Any) -> Tree:
    """Change keys of the second teacher's card; None takes one out."""
    path = folder / "teacher_1.json"
    content = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}
    path.write_text(json.dumps(content))
    return {}


def raw_card(folder: Path, text: str) -> Tree:
    (folder / "teacher_1.json").write_text(text)
    return {}


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Tree:
    """Change the second teacher's tensors in place."""
    path = folder / "teacher_1.safetensors"
    state = load_state(path)
    change(state)
    save_weights(state, path)
    return {}


def poison(state: dict[str, Tensor]) -> None:
    state["conv1.weight"][0, 0, 0, 0] = float("nan")


def no_file(folder: Path, *names: str) -> Tree:
    for name in names:
        (folder / name).unlink()
    return {}


def teachers(*sections: Tree) -> Tree:
    """The first teacher as it is written, and others from nothing."""
    return {"teachers": [{"name": f"r{i}", "weights": "random", **section} for i, section in enumerate(sections)]}


def images(folder: Path, *, size: int = 8, channels: int = 3, **arrays: Any) -> Tree:
    """An evaluation set of 10 train and 10 test images in 5 classes, with other arrays in place of its own."""
    whole = {
        "classes": np.array(NAMES),
        **{f"{part}_x": np.zeros((10, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")},
        **{f"{part}_y": np.arange(10) % 5 for part in ("train", "test")},
        **arrays,
    }
    np.savez(folder / "images.npz", **whole)
    dataset = {"kind": "npz", "path": str(folder / "images.npz"), "size": size, "channels": channels}
    return {"evaluation": {"dataset": dataset}}


class Flat(nn.Module):
    """Without convolution or batch norm."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def without_linear(classes: int, channels: int) -> nn.Module:
    """All convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, classes, 3), nn.BatchNorm2d(classes), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture
def odd_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flat` has no map and no batch norm, `conv` no linear classifier; `big` takes no image below 20 pixels."""
    monkeypatch.setitem(registry.ZOO, "flat", Flat)
    monkeypatch.setitem(registry.ZOO, "conv", without_linear)
    monkeypatch.setitem(registry.ZOO, "big", lambda classes, channels: nn.Conv2d(channels, classes, 20))


def test_the_recipe_itself_is_accepted(tmp_path: Path, capsys: Capture) -> None:
    rounds = {"warmup": 1, "main": 1, "student_steps": 1}
    code = main(["train", str(spoil(tmp_path, lambda f: images(f) | {"rounds": rounds}))])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()


TEACHERS: dict[str, tuple[Change, list[str]]] = {
    "class count": (lambda f: card(f, num_classes=6, classes=None), ["teacher t1 has 6 classes", "num_classes is 5"]),
    "class names": (
        lambda f: card(f, classes=["class_0", "class_1", "class_2", "class_3", "dog"]),
        ["teacher t1: class names differ", "only here ['dog']", "missing ['class_4']"],
    ),
    "too few names": (lambda f: card(f, classes=["a", "b"]), ["teacher t1: 2 class names for 5 classes"]),
    "missing tensor": (
        lambda f: tensors(f, lambda s: s.pop("conv1.weight")),
        ["teacher t1", "teacher_1.safetensors", "missing: conv1.weight"],
    ),
    "unexpected tensor": (
        lambda f: tensors(f, lambda s: s.update(extra=torch.zeros(1))),
        ["teacher t1", "unexpected: extra"],
    ),
    "other shape": (
        lambda f: tensors(f, lambda s: s.update({"conv1.weight": torch.zeros(2, 2)})),
        ["teacher t1", "conv1.weight [2, 2] instead of [16, 1, 3, 3]"],
    ),
    "other arch": (lambda f: card(f, arch="tiny"), ["teacher t1", "does not fit"]),
    "nan": (lambda f: tensors(f, poison), ["teacher t1", "NaN or infinity in: conv1.weight"]),
    "no weights": (
        lambda f: no_file(f, "teacher_1.safetensors"),
        ["teacher t1", "teacher_1.safetensors: no such file"],
    ),
    "no files": (
        lambda f: no_file(f, "teacher_1.safetensors", "teacher_1.json"),
        ["teachers.1 (t1)", "teacher_1.safetensors: no such file"],
    ),
    "no card": (
        lambda f: no_file(f, "teacher_1.json"),
        ["teachers.1 (t1): arch, mean, std not given, neither here nor in", "teacher_1.json"],
    ),
    "broken card": (lambda f: raw_card(f, '{"arch": "tiny", '), ["teacher_1.json: not valid JSON", "line 1"]),
    "card of another kind": (lambda f: raw_card(f, "[1]"), ["teacher_1.json: expected keys and values, found a list"]),
    "unknown key": (lambda f: card(f, archs="tiny"), ["teacher_1.json: unknown keys ['archs']", "allowed", "'arch'"]),
    "wrong kind of value": (
        lambda f: card(f, num_classes="five"),
        ["teacher_1.json: num_classes must be a number of at least 1, found 'five'"],
    ),
    "short mean": (
        lambda f: card(f, channels=3, std=[0.1, 0.2, 0.3]),
        ["teachers.1 (t1): mean: expected 3 values", "found [0.3]"],
    ),
    "zero std": (lambda f: card(f, std=[0.0]), ["teachers.1 (t1): std: expected positive values, found [0.0]"]),
    "unknown network": (lambda f: card(f, arch="resnt8"), ["teachers.1.arch", "'resnt8'", "nearest", "resnet8"]),
    "too small for it": (
        lambda f: teachers({"arch": "tiny"}, {"arch": "big"}),
        ["network r1 does not take images [N, 3, 8, 8]"],
    ),
}


@pytest.mark.usefixtures("odd_networks")
@pytest.mark.parametrize("case", TEACHERS)
def test_teachers_that_cannot_be_used(tmp_path: Path, capsys: Capture, case: str) -> None:
    change, needles = TEACHERS[case]
    said = refusal(capsys, tmp_path, "train", spoil(tmp_path, change))
    for needle in needles:
        assert needle in said


class Touch:
    """Pickled, it writes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, capsys: Capture, write: Any) -> None:
    recipe, trap = recipe_file(tmp_path), tmp_path / "trap"
    write({"conv1.weight": Touch(trap)}, tmp_path / "teacher_1.pt")
    override = f"teachers.1.weights={tmp_path / 'teacher_1.pt'}"
    said = refusal(capsys, tmp_path, "train", recipe, override)
    assert "teacher t1" in said and "teacher_1.pt: refused" in said
    assert not trap.exists()


FLAT = teachers({"arch": "tiny"}, {"arch": "flat"})
NO_BN, NO_VID = {"source": {"loss": {"bn": 0.0}}}, {"objective": {"vid": 0.0}}
COLD = {"rounds": {"warmup": 0}}
QUIET = {"source": {"assistant": {"objective": {"vid": 0.0}}}}

TERMS: dict[str, tuple[list[Tree], str]] = {
    "bn": (
        [teachers({"arch": "tiny"}, {"arch": "lenet5", "size": 32})],
        "source.loss.bn is 0.1, but teacher r1 (lenet5) has no batch norm with stored statistics; set source.loss.bn",
    ),
    "bn of the warm-up": (
        [teachers({"arch": "lenet5", "size": 32}), NO_BN],
        "source.warmup_loss.bn is 1, but teacher r0 (lenet5) has no batch norm",
    ),
    "act": (
        [teachers({"arch": "conv"}), {"source": {"loss": {"act": 0.5}}}],
        "source.loss.act is 0.5, but teacher r0 (conv) has no linear classifier",
    ),
    "vid": ([FLAT, NO_BN, COLD], "objective.vid is 1, but teacher r1 has no convolution map to compare"),
    "at": (
        [FLAT, NO_BN, NO_VID, COLD, {"objective": {"at": 2.5}}],
        "objective.at is 2.5, but teacher r1 has no convolution map",
    ),
    "the assistant's vid": (
        [FLAT, NO_BN, NO_VID, COLD],
        "source.assistant.objective.vid is 1, but teacher r1 has no convolution map",
    ),
    "the student's map": ([{"student": {"arch": "flat"}}], "objective.vid is 1, but student has no convolution map"),
    "the assistant's map": (
        [{"source": {"assistant": {"arch": "flat"}}}],
        "source.assistant.objective.vid is 1, but assistant/t0 has no convolution map",
    ),
}


@pytest.mark.usefixtures("odd_networks")
@pytest.mark.parametrize("case", TERMS)
def test_terms_that_a_network_cannot_serve(tmp_path: Path, capsys: Capture, case: str) -> None:
    changes, needle = TERMS[case]
    path = recipe_file(tmp_path)
    tree = yaml.safe_load(path.read_text())
    for change in changes:
        tree = merged(tree, change)
    path.write_text(yaml.safe_dump(tree))
    assert needle in refusal(capsys, tmp_path, "train", path)


@pytest.mark.usefixtures("odd_networks")
def test_terms_without_a_weight_ask_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = recipe_file(tmp_path)
    tree = yaml.safe_load(path.read_text())
    for change in (FLAT, NO_BN, NO_VID, QUIET, {"rounds": {"warmup": 0, "main": 1}}):
        tree = merged(tree, change)
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path)]) == 0, capsys.readouterr().err


IMAGES: dict[str, tuple[Change, list[str]]] = {
    "shape": (
        lambda f: images(f, test_x=np.zeros((10, 64), dtype=np.uint8)),
        ["evaluation.dataset", "images.npz", "'test_x'", "expected uint8 [N, H, W]", "found uint8 (10, 64)"],
    ),
    "kind": (lambda f: images(f, test_x=np.zeros((10, 8, 8, 3))), ["'test_x'", "found float64"]),
    "labels too high": (
        lambda f: images(f, test_y=np.arange(10)),
        ["'test_y'", "expected labels 0 .. 4, found 0 .. 9"],
    ),
    "labels below zero": (lambda f: images(f, test_y=np.arange(10) % 5 - 1), ["'test_y'", "found -1 .. 3"]),
    "labels missing": (lambda f: images(f, test_y=np.arange(5)), ["one label for each of 10 images, found 5"]),
    "class count": (
        lambda f: images(f, classes=np.array(list("abc")), test_y=np.zeros(10, dtype=int)),
        ["evaluation.dataset has 3 classes, but num_classes is 5"],
    ),
    "class names": (
        lambda f: images(f, classes=np.array(list("abcde"))),
        ["evaluation.dataset: its class names are not the run's", "class_0"],
    ),
    "no file": (
        lambda f: images(f) | no_file(f, "images.npz"),
        ["evaluation.dataset", "images.npz: no such file"],
    ),
    "no archive": (
        lambda f: images(f) | ((f / "images.npz").write_text("images") and {}),
        ["images.npz: not a readable .npz archive"],
    ),
    "parties": (
        lambda f: merged(images(f), {"evaluation": {"split": {"mode": "ibl", "parties": 6, "ratio": 2.0}}}),
        ["parties: expected 1 .. 5", "found 6"],
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_evaluation_sets_that_cannot_be_used(tmp_path: Path, capsys: Capture, case: str) -> None:
    change, needles = IMAGES[case]
    said = refusal(capsys, tmp_path, "train", spoil(tmp_path, change))
    for needle in needles:
        assert needle in said


OVERRIDES = [
    ("mesh.rows=3", ["mesh.rows is 3, which does not divide the 1 ranks; allowed: [1]"]),
    ("student.arch=resnt8", ["student: unknown network 'resnt8'", "resnet8"]),
    ("student.arch=big", ["student: network student does not take images [N, 3, 8, 8]"]),
    ("student.mean=[0.5]", ["student: mean: expected 3 values", "found [0.5]"]),
    ("student.weights=/nowhere/s.safetensors", ["student.weights: /nowhere/s.safetensors: no such file"]),
    ("source.assistant.arch=nothing", ["assistant/t0: unknown network 'nothing'"]),
    ("teachers.0.weight=1.0", ["give a weight to all or to none; without one: t1"]),
    ("rounds.man=3", ["rounds.man: unknown key", "did you mean 'main'", "allowed"]),
    ("batch=1", ["batch is 1, fewer than the 2 teachers"]),
    ("batch", ["override 'batch': expected key=value"]),
]


@pytest.mark.usefixtures("odd_networks")
@pytest.mark.parametrize(("override", "needles"), OVERRIDES)
def test_values_that_cannot_be_used(tmp_path: Path, capsys: Capture, override: str, needles: list[str]) -> None:
    said = refusal(capsys, tmp_path, "train", recipe_file(tmp_path), override)
    for needle in needles:
        assert needle in said


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path: Path, capsys: Capture) -> None:
    said = refusal(capsys, tmp_path, "train", "debug/dfmg.yaml")
    assert "no recipe file debug/dfmg.yaml; did you mean 'debug/dfmf.yaml'?" in said


@pytest.mark.parametrize("action", ["train", "config", "plan"])
def test_every_command_refuses_alike(tmp_path: Path, capsys: Capture, action: str) -> None:
    assert "seed" in refusal(capsys, tmp_path, action, recipe_file(tmp_path), "seed=-1")


# --------------------------------------------------------------------------------------- directories


def test_a_run_is_not_written_over(tmp_path: Path, capsys: Capture) -> None:
    recipe, run = recipe_file(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    said = refusal(capsys, tmp_path, "train", recipe)
    assert f"{run} exists; give --resume to go on, --overwrite to start again, or out=OTHER" in said
    assert "not a run; --overwrite refuses to delete it" in refusal(capsys, tmp_path, "train", recipe, "--overwrite")


def test_another_recipe_is_not_resumed(tmp_path: Path, capsys: Capture) -> None:
    recipe = recipe_file(tmp_path)
    assert main(["train", str(recipe), "rounds.warmup=0", "rounds.main=1", "log.grids=false"]) == 0
    said = refusal(capsys, tmp_path, "train", recipe, "rounds.warmup=0", "rounds.main=1", "batch=12", "--resume")
    assert "--resume with another recipe: batch (was 11, now 12)" in said


@pytest.mark.parametrize("out", ["/proc/dfkd/run", "{folder}/recipe.yaml/run", "{folder}/recipe.yaml"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, capsys: Capture, out: str) -> None:
    out = out.replace("{folder}", str(tmp_path))
    assert out in refusal(capsys, tmp_path, "train", recipe_file(tmp_path), f"out={out}")


def test_a_placeholder_that_does_not_exist_is_refused(tmp_path: Path, capsys: Capture) -> None:
    said = refusal(capsys, tmp_path, "train", recipe_file(tmp_path), "out=runs/{sed}")
    assert "out: 'runs/{sed}' cannot be filled in" in said and "{seed}" in said


@pytest.mark.parametrize("action", ["evaluate", "export"])
@pytest.mark.parametrize("place", ["nowhere", "."])
def test_only_a_run_can_be_evaluated_or_exported(tmp_path: Path, capsys: Capture, action: str, place: str) -> None:
    assert "is not a run: it holds no recipe.yaml" in refusal(capsys, tmp_path, action, tmp_path / place)


# -------------------------------------------------------------------------------------- private teachers

PRIVATE = [
    ("archs=[tiny, nothing]", "archs: unknown network 'nothing'"),
    ("archs=[tiny, tiny, tiny]", "archs: give 1 or split.parties (2) names, got 3"),
    ("archs=[big]", "archs: network t0 does not take images [N, 1, 16, 16]"),
    ("gold=nothing", "gold: unknown network 'nothing'"),
    ("pretrained=true", "pretrained: true is for torchvision/NAME and timm/NAME"),
    ("split.parties=11", "11"),
    ("dataset={kind: npz, path: /nowhere.npz, size: 8, channels: 1}", "dataset: /nowhere.npz: no such file"),
]


@pytest.mark.usefixtures("odd_networks")
@pytest.mark.parametrize(("override", "needle"), PRIVATE)
def test_private_teachers_that_cannot_be_trained(tmp_path: Path, capsys: Capture, override: str, needle: str) -> None:
    train = ("teachers", "train", "debug/teachers.yaml", f"out={tmp_path / 'made'}", override)
    assert needle in refusal(capsys, tmp_path, *train)


# ------------------------------------------------------------------------------------------ several ranks


class Two(Group):
    """The other rank fails, or not."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.handle]


def fail() -> int:
    raise LookupError("own trouble")


def test_a_rank_hears_of_the_others_failures() -> None:
    with pytest.raises(ValueError, match="rank 1: disk on fire"):
        agreed(Two((0, 1), 0, "disk on fire"), lambda: 3)
    with pytest.raises(LookupError, match="own trouble"):
        agreed(Two((0, 1), 0, "disk on fire"), fail)
    assert agreed(Two((0, 1), 0, None), lambda: 3) == agreed(ALONE, lambda: 3) == 3
