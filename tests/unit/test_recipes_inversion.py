"""The recipes of DeepInversion hold values typed here from the papers and the released code, and fit their teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfkd_dist.config import (
    DeepInversionSpec,
    InversionSpec,
    Recipe,
    StreamSpec,
    load_recipe,
    load_teachers_recipe,
)
from dfkd_dist.engine.synthesize import recipe_of_pool
from dfkd_dist.models.registry import build_network
from dfkd_dist.resources import configs_dir

FOLDER = configs_dir() / "inversion"
NAMES = sorted(path.stem for path in FOLDER.glob("*deepinversion*.yaml"))
PAIRS = [("resnet34", "resnet18"), ("vgg11_bn", "resnet18")]
PAIRS += [("wrn40_2", student) for student in ("wrn16_1", "wrn40_1", "wrn16_2")]
TABLE_1 = {
    "cifar10": ("93.26", "90.36", "83.04", "86.85", "89.72"),
    "cifar100": ("61.32", "54.13", "53.77", "61.33", "61.34"),
}
WITH_KDCI = {
    "cifar10": ("93.67", "91.42", "83.47", "89.32", "91.06"),
    "cifar100": ("74.59", "69.67", "55.22", "62.13", "65.90"),
}
TABLE_3 = {"resnet18": ("51.36", "55.27"), "mobilenetv2": ("40.25", "46.24")}
ROWS = [(data, row) for data in TABLE_1 for row in range(len(PAIRS))]


def assert_compensated(plain: str, number: str) -> None:
    """The other arm differs in the compensation alone: 32 prototypes."""
    one, other = load(plain), load(f"{plain}_compensated")
    assert other.compensation is not None and (other.compensation.size, other.compensation.hidden) == (32, 256)
    assert f"DeepInv+KDCI {number} %" in other.about
    named = {"name": one.name, "method": one.method, "about": one.about, "compensation": None}
    assert other.model_copy(update=named) == one


def load(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def synthesis(recipe: Recipe) -> DeepInversionSpec:
    assert isinstance(recipe.source, InversionSpec) and isinstance(recipe.source.synthesis, DeepInversionSpec)
    return recipe.source.synthesis


def weights(recipe: Recipe) -> dict[str, float]:
    return {name: weight for name, weight in synthesis(recipe).loss.weights().items() if weight > 0}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_called_like_its_file(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.method == ("KDCI" if name.endswith("_compensated") else "DeepInversion")


@pytest.mark.parametrize(("data", "row"), ROWS)
def test_kdcis_table_1_with_appendix_g(data: str, row: int) -> None:
    teacher, student = PAIRS[row]
    name = f"deepinversion_kdci_{data}_{teacher}_{student}"
    recipe = load(name)
    spec = synthesis(recipe)
    assert (recipe.teachers[0].arch, recipe.student.arch) == (teacher, student)
    assert f"DeepInv {TABLE_1[data][row]} %" in recipe.about
    assert weights(recipe) == {"ce": 1.0, "bn": 0.1, "tv": 2.5e-5, "l2": 3e-8, "js": 10.0}
    assert [(stage.iterations, stage.scale, stage.jitter) for stage in spec.stages] == [(1000, 1, 2)]
    assert (spec.lr, spec.schedule, spec.clip, spec.flip) == (0.05, "constant", False, False)
    assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    assert (recipe.batch, recipe.rounds.main, recipe.schedule.kind) == (256, 200, "cosine")
    assert (recipe.objective.kl, recipe.objective.temperature) == (1.0, 1.0)  # type: ignore[union-attr]
    assert_compensated(name, WITH_KDCI[data][row])


@pytest.mark.parametrize(("data", "row"), ROWS)
def test_the_released_code_for_cifar(data: str, row: int) -> None:
    recipe = load(f"deepinversion_{data}_{'_'.join(PAIRS[row])}")
    spec = synthesis(recipe)
    assert weights(recipe) == {"ce": 1.0, "bn": 10.0, "tv": 2.5e-5}
    assert [(stage.iterations, stage.jitter) for stage in spec.stages] == [(2000, 2)]
    assert (spec.lr, spec.betas, spec.schedule, spec.clip, spec.flip) == (0.05, [0.9, 0.999], "constant", False, False)
    assert recipe.objective.temperature == 3.0  # type: ignore[union-attr]
    recipe_of_pool(recipe, Path("pool"))  # no student: it can be made once


@pytest.mark.parametrize("data", TABLE_1)
def test_the_port_in_cmis_repository(data: str) -> None:
    recipe = load(f"deepinversion_port_{data}_resnet34_resnet18")
    assert weights(recipe) == {"ce": 1.0, "bn": 10.0, "tv": 1e-3, "js": 1.0}
    assert synthesis(recipe).competition.form == "negative" and synthesis(recipe).stages[0].iterations == 1000


SETTINGS = {
    "": ([(2000, 2, 15), (1000, 1, 30)], [0.5, 0.9], True),
    "_setting1": ([(2000, 1, 30)], [0.5, 0.9], True),
    "_setting2": ([(20000, 1, 30)], [0.9, 0.999], False),
}


@pytest.mark.parametrize("student", TABLE_3)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_released_code_for_imagenet(student: str, setting: str) -> None:
    recipe = load(f"deepinversion_imagenet_resnet50_{student}{setting}")
    spec, (stages, betas, clip) = synthesis(recipe), SETTINGS[setting]
    assert [(stage.iterations, stage.scale, stage.jitter) for stage in spec.stages] == stages
    assert (spec.betas, spec.clip, spec.flip) == (betas, clip, True)
    assert (spec.lr, spec.schedule, spec.warmup, spec.bn.first_layer) == (0.25, "cosine", 100, 10.0)
    assert weights(recipe) == {"ce": 1.0, "bn": 0.01, "tv": 1e-4, "l2": 1e-5, "js": 0.2}
    assert isinstance(recipe.source, InversionSpec) and recipe.source.batch == 84
    if not setting:
        assert f"DeepInv {TABLE_3[student][0]} %" in recipe.about
        assert_compensated(recipe.name, TABLE_3[student][1])
    with torch.device("meta"):
        build_network(recipe.student.arch, num_classes=1000, in_channels=3)


def test_tiny_imagenet() -> None:
    recipe = load("deepinversion_kdci_tinyimagenet_resnet34_resnet18")
    assert_compensated(recipe.name, "34.84")
    assert "DeepInv 20.68 %" in recipe.about and weights(recipe)["js"] == 10.0
    assert (recipe.image.size, recipe.num_classes, recipe.teachers[0].arch) == (64, 200, "resnet34")


@pytest.mark.parametrize("name", [name for name in NAMES if "imagenet_resnet50" not in name])
def test_teachers_are_those_of_a_teachers_recipe(name: str) -> None:
    recipe = load(name)
    run = Path(recipe.teachers[0].weights).parent.name
    made = load_teachers_recipe(configs_dir() / "teachers" / f"{run}.yaml")
    assert Path(recipe.teachers[0].weights).parent == made.out_dir()
    assert {teacher.arch for teacher in recipe.teachers} == set(made.archs)
    for teacher in recipe.teachers:
        assert (teacher.size, teacher.channels) == (made.dataset.size, made.dataset.channels)
        assert (teacher.mean, teacher.std) == (made.mean, made.std)


def test_several_teachers() -> None:
    assert len(load("deepinversion_cifar10_ibl3").teachers) == len(load("cpu_deepinversion_mnist_ibl3").teachers) == 2


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_stream")])
def test_a_pool_is_distilled_as_its_recipe_says(name: str) -> None:
    """The command in the recipe makes the shards that it reads, from the same teacher."""
    recipe = load(name)
    assert isinstance(recipe.source, StreamSpec)
    text = (FOLDER / f"{name}.yaml").read_text() + (FOLDER / "cpu_deepinversion_cifar10_pool.yaml").read_text()
    command = next(line for line in text.splitlines() if recipe.source.reader.shards in line and "synthesize" in line)
    made = load_recipe(FOLDER.parent / command.split()[3])
    recipe_of_pool(made, Path(command.split()[-1]))
    assert made.teachers == recipe.teachers and made.image == recipe.image
