"""The recipes of KD3's tables hold values typed here from the paper, and fit their teachers' recipes."""

from itertools import product
from pathlib import Path

import pytest
import torch

from dfkd_dist.config import KD3Spec, Recipe, SelectionSpec, StreamSpec, load_recipe, load_teachers_recipe
from dfkd_dist.engine.teachers import teacher_cards
from dfkd_dist.models.network import parameter_count
from dfkd_dist.models.registry import build_network
from dfkd_dist.resources import configs_dir

KD3 = configs_dir() / "kd3"
NAMES = sorted(path.stem for path in KD3.glob("*.yaml"))
DATA = {"cifar10": (10, 32), "cifar100": (100, 32), "cinic": (10, 32), "tinyimagenet": (200, 64)}
"""Classes and pixels."""
WITH_IMAGENET = [name for name in NAMES if name.split("_")[0] in DATA]
PLAIN = "cifar10_resnet34_resnet18"

PAIRS_1 = [("resnet34", "resnet18"), ("vgg16", "vgg13")]
PAIRS_3 = [("resnet32x4", s) for s in ("resnet8x4", "mobilenetv2", "shufflenetv1", "shufflenetv2")]
PAIRS_3 += [("resnet110x2", s) for s in ("resnet110", "resnet116", "shufflenetv1", "shufflenetv2")]
TABLE_2 = {
    "hard": ("93.42", "74.54"),
    "soft": ("93.98", "76.92"),
    "random": ("90.22", "73.60"),
    "only_student": ("91.99", "75.30"),
    "only_teacher": ("94.01", "76.76"),
    "no_mdcl": ("94.48", "77.35"),
    "no_md": ("94.61", "77.43"),
}
MILLIONS = {  # Tables 1 and 3, at ten classes
    "resnet34": 21.28,
    "resnet18": 11.17,
    "vgg16": 14.73,
    "vgg13": 9.42,
    "resnet32x4": 7.41,
    "resnet8x4": 1.21,
    "shufflenetv1": 0.86,
    "shufflenetv2": 1.26,
    "resnet110x2": 6.89,
    "resnet110": 1.73,
    "resnet116": 1.83,
    "lenet5": 0.062,
}


def load(name: str) -> Recipe:
    return load_recipe(KD3 / f"{name}.yaml")


def objective(recipe: Recipe) -> KD3Spec:
    assert isinstance(recipe.objective, KD3Spec)
    return recipe.objective


def source(recipe: Recipe) -> StreamSpec:
    assert isinstance(recipe.source, StreamSpec)
    return recipe.source


def selection(recipe: Recipe) -> SelectionSpec:
    found = source(recipe).selection
    assert found is not None and found.kind == "kd3"
    return found


def test_there_is_a_recipe_for_every_row() -> None:
    rows = {f"{d}_{t}_{s}" for d, (t, s) in product(DATA, PAIRS_1 + PAIRS_3 + [("resnet34", "vgg13")])}
    rows |= {f"{d}_resnet34_resnet18_{kind}" for d, kind in product(("cifar10", "cifar100"), TABLE_2)}
    rows |= {f"{d}_resnet34_{s}_{p}pct" for d, s, p in product(DATA, ("resnet18", "vgg13"), (5, 25, 50, 75))}
    rows |= {f"{PLAIN}_alpha{v}" for v in ("0.001", "0.1", "1")} | {f"{PLAIN}_tau{v}" for v in ("0.1", "0.5", "0.7")}
    rows |= {f"{PLAIN}_vth{v}" for v in ("0.9", "0.925", "0.975")}
    assert rows | {"mnist_lenet5_lenet5_half", "cpu_mnist_mnistm", "cpu_mnist_web"} == set(NAMES)


@pytest.mark.parametrize("name", WITH_IMAGENET)
def test_section_4_holds_for_every_row(name: str) -> None:
    recipe = load(name)
    classes, size = DATA[name.split("_")[0]]
    assert (recipe.name, recipe.method) == (name, "kd3")
    assert (recipe.num_classes, recipe.image.size, recipe.image.channels) == (classes, size, 3)
    assert source(recipe).reader.shards == f"data/shards/imagenet{size}"
    assert (recipe.rounds.main, recipe.rounds.student_steps, recipe.rounds.warmup) == (240, "epoch", 0)
    sgd, epochs = recipe.optimizer, [round(m * 240, 9) for m in recipe.schedule.milestones]
    assert (sgd.kind, sgd.lr, sgd.momentum, sgd.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert (epochs, recipe.schedule.gamma) == ([150, 180, 210], 0.1)
    assert (recipe.teachers[0].arch, recipe.student.arch) == tuple(name.split("_")[1:3])


def test_mnist_is_trained_with_adam() -> None:
    recipe = load("mnist_lenet5_lenet5_half")
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.rounds.main) == ("adam", 1e-3, 40)
    assert (recipe.image.channels, recipe.num_classes) == (1, 10)
    assert (recipe.teachers[0].arch, recipe.student.arch) == ("lenet5", "lenet5_half")


CHANGES = {  # what a row changes: alpha of Eq. 18, tau, V_th, classifier, perturbation, mode, fraction
    "alpha0.001": {"mdcl": 0.001},
    "alpha0.1": {"mdcl": 0.1},
    "alpha1": {"mdcl": 1.0},
    "tau0.1": {"temperature": 0.1},
    "tau0.5": {"temperature": 0.5},
    "tau0.7": {"temperature": 0.7},
    "vth0.9": {"threshold": 0.9},
    "vth0.925": {"threshold": 0.925},
    "vth0.975": {"threshold": 0.975},
    "hard": {"classifier": "hard"},
    "soft": {"classifier": "soft"},
    "no_mdcl": {"mdcl": 0.0},
    "no_md": {"perturb": "mixup"},
    "random": {"mode": "random"},
    "only_student": {"mode": "student"},
    "only_teacher": {"mode": "teacher"},
    "5pct": {"fraction": 0.05},
    "25pct": {"fraction": 0.25},
    "50pct": {"fraction": 0.5},
    "75pct": {"fraction": 0.75},
}
PAPER = {"mdcl": 0.01, "temperature": 0.3, "threshold": 0.95, "classifier": "shared", "perturb": "mixdistribution"}
PAPER |= {"mode": "dynamic", "fraction": 1.0, "reduction": "mean", "denominator": "others", "counts": "all"}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_changes_what_its_name_says_and_nothing_else(name: str) -> None:
    recipe = load(name)
    change = next((c for ending, c in CHANGES.items() if name.endswith("_" + ending)), {})
    places = (objective(recipe), selection(recipe), source(recipe).reader)
    found = {key: next(getattr(place, key) for place in places if hasattr(place, key)) for key in PAPER}
    assert found == PAPER | change


@pytest.mark.parametrize("kind", TABLE_2)
def test_table_2_is_quoted(kind: str) -> None:
    for data, accuracy in zip(("cifar10", "cifar100"), TABLE_2[kind], strict=True):
        assert f"{accuracy} %" in load(f"{data}_resnet34_resnet18_{kind}").about


@pytest.mark.parametrize("name", NAMES)
def test_teachers_are_those_of_a_teachers_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(name)
    (teacher,) = recipe.teachers
    made = load_teachers_recipe(configs_dir() / "teachers" / f"{Path(teacher.weights).parent.name}.yaml")
    assert teacher.weights == str(made.out_dir() / "t0.safetensors") and made.archs == [teacher.arch]
    assert (teacher.size, teacher.channels) == (made.dataset.size, made.dataset.channels)
    assert (teacher.mean, teacher.std) == (made.mean, made.std)
    assert recipe.evaluation is not None and recipe.evaluation.dataset == made.dataset
    monkeypatch.chdir(tmp_path)
    assert teacher_cards(recipe)[0].size == recipe.image.size  # complete without the weights


@pytest.mark.parametrize("arch", MILLIONS)
def test_networks_have_the_papers_number_of_parameters(arch: str) -> None:
    with torch.device("meta"):
        network = build_network(arch, num_classes=10, in_channels=1 if arch == "lenet5" else 3)
    assert parameter_count(network) / 1e6 == pytest.approx(MILLIONS[arch], rel=0.01)
