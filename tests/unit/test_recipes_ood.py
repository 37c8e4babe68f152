"""Recipes of DFND and of the out-of-domain baselines: values typed here from the papers, and layers that exist."""

from itertools import product
from pathlib import Path

import pytest
import torch

from dfkd_dist.config import LabelledSpec, NoisySpec, ObjectiveSpec, Recipe, SSKDSpec, StreamSpec, load_recipe
from dfkd_dist.config import load_teachers_recipe as load_teachers
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.signals import NAMED_MAP
from dfkd_dist.objectives.registry import needs
from dfkd_dist.resources import configs_dir

OOD, DFND = configs_dir() / "ood", configs_dir() / "dfnd"
PAIRS = ("resnet34_resnet18", "vgg11_bn_resnet18", "wrn40_2_wrn16_1", "wrn40_2_wrn40_1", "wrn40_2_wrn16_2")
# MosaicKD, Table 1, the column of WRN-40-2 to WRN-16-1.
TABLE_1 = {
    ("cifar10", "kd"): "47.47",
    ("cifar10", "balanced"): "50.50",
    ("cifar10", "fitnet"): "50.31",
    ("cifar10", "rkd"): "45.37",
    ("cifar10", "crd"): "47.00",
    ("cifar10", "sskd"): "49.57",
    ("imagenet", "kd"): "36.54",
    ("imagenet", "balanced"): "31.61",
    ("imagenet", "fitnet"): "42.63",
    ("imagenet", "rkd"): "31.15",
    ("places365", "kd"): "33.28",
    ("places365", "balanced"): "23.22",
    ("places365", "fitnet"): "36.33",
    ("places365", "rkd"): "28.07",
    ("svhn", "kd"): "19.77",
    ("svhn", "balanced"): "16.18",
    ("svhn", "fitnet"): "20.02",
    ("svhn", "rkd"): "18.09",
}
# KDCI, Table 1: DFND and the teachers' accuracies.
DFND_ROWS = {
    "cifar10": (("95.36", "91.86", "90.26", "93.33", "93.11"), (0.957, 0.9225, 0.9487, 0.9487, 0.9487)),
    "cifar100": (("74.42", "68.97", "59.02", "69.39", "69.85"), (0.7805, 0.7132, 0.7583, 0.7583, 0.7583)),
}


def ood(name: str) -> Recipe:
    return load_recipe(OOD / f"{name}.yaml")


def stream(recipe: Recipe) -> StreamSpec:
    assert isinstance(recipe.source, StreamSpec)
    return recipe.source


@pytest.mark.parametrize("path", sorted([*OOD.glob("*.yaml"), *DFND.glob("*.yaml")]), ids=lambda path: path.stem)
def test_teachers_have_a_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == (path.stem if path.parent == OOD else f"dfnd_{path.stem}")
    for teacher in recipe.teachers:
        name = Path(teacher.weights).parent.name
        if name == "imagenet_resnet50":  # torchvision's
            continue
        made = load_teachers(configs_dir() / "teachers" / f"{name}.yaml")
        assert teacher.weights == str(made.out_dir() / "t0.safetensors")
        assert ([teacher.arch], teacher.mean, teacher.std) == (made.archs, made.mean, made.std)


@pytest.mark.parametrize(("data", "row"), TABLE_1)
def test_a_row_of_mosaickds_table_1(data: str, row: str) -> None:
    recipes = [ood(f"cifar100_from_{data}_{pair}_{row}") for pair in PAIRS]
    assert TABLE_1[data, row] in recipes[2].about
    for recipe, pair in zip(recipes, PAIRS, strict=True):
        assert f"{recipe.teachers[0].arch}_{recipe.student.arch}" == pair
        assert (recipe.batch, recipe.rounds.student_steps, recipe.num_classes) == (128, "epoch", 100)
        assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.kind) == (0.1, 1e-4, "cosine")
        assert recipe.rounds.main == (1000 if row == "balanced" else 200)
        chosen = stream(recipe).selection
        subset = data in ("imagenet", "places365")
        assert (chosen is None) == (row != "balanced" and not subset)
        if chosen is not None:
            assert (chosen.kind, chosen.balanced) == ("top", row == "balanced")
            assert (chosen.score == "entropy") == subset
        _check_objective(recipe, row)


def _check_objective(recipe: Recipe, row: str) -> None:
    spec = recipe.objective
    if row == "sskd":
        assert isinstance(spec, SSKDSpec)
        assert (spec.kl, spec.tf, spec.ss, spec.keep_ss, spec.ss_temperature) == (0.9, 2.7, 10.0, 0.75, 0.5)
        assert spec.head_rounds == recipe.rounds.main // 5
        return
    assert isinstance(spec, ObjectiveSpec)
    extra = {"fitnet": {"hint": 100.0}, "rkd": {"rkd_d": 25.0, "rkd_a": 50.0}, "crd": {"crd": 0.8}}.get(row, {})
    assert {n: w for n, w in spec.weights().items() if w > 0} == {"kl": 1.0} | extra
    assert (spec.temperature, spec.kl_scale) == (5.0, "tau2")


@pytest.mark.parametrize("pair", PAIRS)
def test_hints_are_at_layers_that_exist(pair: str) -> None:
    recipe = ood(f"cifar100_from_cifar10_{pair}_fitnet")
    wanted, sizes = needs(recipe.objective), []
    for arch, need in ((recipe.teachers[0].arch, wanted.teacher), (recipe.student.arch, wanted.student)):
        network = ImageNetwork(
            build_network(str(arch), num_classes=100), Preprocess(32, 3, [0.5] * 3, [0.5] * 3), str(arch)
        )
        (name,) = (n for n in need if n.startswith(NAMED_MAP))
        sizes.append(network.shapes(32, 3, need)[name])
    assert all(len(size) == 3 for size in sizes) and torch.tensor(sizes).min() >= 4


def test_the_upper_rows_of_table_1() -> None:
    for pair, accuracy in zip(PAIRS, ("77.87", "75.07", "64.06", "68.58", "70.79"), strict=True):
        recipe = ood(f"cifar100_original_{pair}_kd")
        assert accuracy in recipe.about and isinstance(recipe.source, LabelledSpec) and len(recipe.teachers) == 1
        assert (recipe.objective.weights()["kl"], recipe.objective.weights()["ce"]) == (1.0, 1.0)
    for arch, accuracy in {"resnet18": "77.10", "wrn16_1": "65.31", "wrn40_1": "72.19", "wrn16_2": "73.56"}.items():
        recipe = ood(f"cifar100_original_{arch}")
        assert accuracy in recipe.about and not recipe.teachers
        assert (recipe.rounds.main, recipe.rounds.student_steps) == (200 * (50_000 // 128), 1)


@pytest.mark.parametrize(("data", "i"), list(product(DFND_ROWS, range(5))))
def test_a_row_of_kdcis_table_1(data: str, i: int) -> None:
    values, teachers = DFND_ROWS[data]
    recipe = load_recipe(DFND / f"{data}_{PAIRS[i]}.yaml")
    spec, released = recipe.objective, load_recipe(DFND / f"{data}_{PAIRS[i]}_released.yaml").objective
    assert isinstance(spec, NoisySpec) and isinstance(released, NoisySpec)
    assert values[i] in recipe.about and spec.accuracy == released.accuracy == teachers[i]
    assert (spec.kl, spec.temperature, spec.noisy) == (4.0, 1.0, 1.0)
    assert (released.kl, released.temperature, released.kl_scale, released.noisy) == (1.0, 4.0, "tau2", 1.0)
    chosen = stream(recipe).selection
    assert chosen is not None
    assert (chosen.kind, chosen.score, chosen.order, chosen.count) == ("top", "confidence", "highest", 600_000)
    assert recipe.rounds.main == 40_000 * 512 // 600_000 and recipe.rounds.student_steps == "epoch"
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, recipe.batch) == (0.1, 0.9, 5e-4, 256)
    assert recipe.schedule.milestones == [0.4, 0.8]


def test_the_other_tables_of_kdci() -> None:
    tiny = load_recipe(DFND / "tinyimagenet_resnet34_resnet18.yaml")
    assert "42.64" in tiny.about and isinstance(tiny.objective, NoisySpec) and tiny.objective.accuracy == 0.5274
    assert (tiny.rounds.main, tiny.optimizer.lr, tiny.optimizer.weight_decay) == (200, 0.1, 1e-4)
    assert tiny.schedule.kind == "cosine" and tiny.schedule.milestones == []
    for student, accuracy in (("resnet18", "42.82"), ("mobilenetv2", "16.03")):
        recipe = load_recipe(DFND / f"imagenet_resnet50_{student}.yaml")
        assert accuracy in recipe.about and recipe.num_classes == 1000
