"""MosaicKD's shipped recipes: every row of its tables, with values typed here from the paper and its code's command."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

from dfkd_dist.config import MosaicSpec, Recipe, dump, load_recipe, load_teachers_recipe
from dfkd_dist.engine.teachers import teacher_cards
from dfkd_dist.models.registry import ZOO
from dfkd_dist.resources import configs_dir

CONFIGS = configs_dir()
FILES = sorted((CONFIGS / "mosaickd").glob("*.yaml"))
NAMES = [path.stem for path in FILES]

PAIRS = ["resnet34_resnet18", "vgg11_bn_resnet18", "wrn40_2_wrn16_1", "wrn40_2_wrn40_1", "wrn40_2_wrn16_2"]
TABLE_1 = {
    "cifar10": ["77.01", "71.56", "61.01", "69.14", "69.41"],
    "imagenet": ["75.81", "68.94", "59.32", "66.61", "67.36"],
    "places365": ["74.70", "68.55", "56.70", "65.34", "65.89"],
    "svhn": ["47.18", "37.63", "31.87", "45.84", "44.40"],
}
TABLE_3 = {"cub200": "26.11", "dogs": "28.02"}
SIZES = [1, 2, 4, 8, 18, 22, 32]
TABLE_4 = {
    "cifar10": ["52.22", "55.58", "58.94", "61.01", "61.03", "58.94", "51.34"],
    "places365": ["46.44", "45.90", "50.67", "56.70", "53.99", "53.44", "40.29"],
    "svhn": ["19.83", "21.86", "32.09", "31.87", "21.05", "22.08", "20.54"],
}
TABLE_5 = {
    "no_patch": ["51.34", "56.23", "57.23"],
    "no_disc": ["44.05", "58.11", "59.73"],
    "no_adv": ["55.11", "67.57", "68.25"],
}
ROWS_1 = [(ood, pair, value) for ood, row in TABLE_1.items() for pair, value in zip(PAIRS, row, strict=True)]
ROWS_4 = [(ood, size, value) for ood, row in TABLE_4.items() for size, value in zip(SIZES, row, strict=True)]
ROWS_5 = [(cut, pair, value) for cut, row in TABLE_5.items() for pair, value in zip(PAIRS[2:], row, strict=True)]
SUBSETS = {"imagenet": 50_000, "places365": 50_000}


def load(name: str) -> tuple[Recipe, MosaicSpec]:
    recipe = load_recipe(CONFIGS / "mosaickd" / f"{name}.yaml")
    assert isinstance(recipe.source, MosaicSpec)
    return recipe, recipe.source


def of_table_4(ood: str, size: int) -> str:
    return f"cifar100_from_{ood}_{'wrn40_2_wrn16_1' if size == 8 else f'patch{size}'}_paper"


def check_game(source: MosaicSpec) -> None:
    """Adam 1e-3 with betas (0.5, 0.999) and cosine for generator and discriminator, Conv(128) at the start."""
    for player in [source] if source.discriminator is None else [source, source.discriminator]:
        optimizer = player.optimizer
        assert (optimizer.kind, optimizer.lr, optimizer.betas) == ("adam", 1e-3, [0.5, 0.999])
        assert player.schedule.kind == "cosine"
    if source.discriminator is not None:
        assert (source.discriminator.stride, source.discriminator.form) == (1, "non_saturating")


# ------------------------------------------------------------------------------------------ all recipes


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_reads_back_equal_and_knows_its_networks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, source = load(name)
    assert (recipe.name, recipe.method) == (name, "MosaicKD")
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    monkeypatch.chdir(tmp_path)  # no weights file is here
    (card,) = teacher_cards(recipe)
    assert card.num_classes == recipe.num_classes and {card.arch, recipe.student.arch} <= set(ZOO)
    check_game(source)


@pytest.mark.parametrize("name", NAMES)
def test_its_teacher_has_a_recipe(name: str) -> None:
    recipe, _ = load(name)
    (teacher,) = recipe.teachers
    made = load_teachers_recipe(CONFIGS / "teachers" / f"{Path(teacher.weights).parent.name}.yaml")
    assert teacher.weights == str(made.out_dir() / "t0.safetensors")
    assert made.archs == [teacher.arch] and made.split.parties == 1
    assert (teacher.mean, teacher.std) == (made.mean, made.std)
    assert teacher.size == made.dataset.size == recipe.image.size
    assert recipe.evaluation is not None and made.dataset.path == recipe.evaluation.dataset.path


def test_there_is_a_recipe_for_every_row_and_no_other() -> None:
    rows = {f"cifar100_from_{ood}_{pair}_{kind}" for ood, pair, _ in ROWS_1 for kind in ("paper", "released")}
    rows |= {of_table_4(ood, size) for ood, size, _ in ROWS_4}
    rows |= {f"cifar100_from_cifar10_{pair}_{cut}_paper" for cut, pair, _ in ROWS_5}
    rows |= {f"{data}_from_places365_{kind}" for data, kind in product(TABLE_3, ("paper", "released"))}
    rows |= {f"cpu_{data}_from_photos_{kind}" for data, kind in product(("mnist", "cifar10"), ("paper", "released"))}
    assert rows == set(NAMES)


# ----------------------------------------------------------------------------------------------- tables


def check_values(recipe: Recipe, ood: str) -> None:
    epoch = 287 if ood == "svhn" else 196  # ceil(73,257 / 256), ceil(50,000 / 256)
    assert (recipe.rounds.warmup, recipe.rounds.main, recipe.rounds.student_steps) == (0, 200 * epoch, 5)
    assert recipe.batch == 256 and recipe.num_classes == 100 and recipe.image.size == 32
    student = recipe.optimizer
    assert (student.kind, student.lr, student.momentum, student.nesterov) == ("sgd", 0.1, 0.9, False)
    assert (student.weight_decay, recipe.schedule.kind) == (1e-4, "cosine")
    assert (recipe.objective.weights()["kl"], recipe.objective.model_dump()["temperature"]) == (1.0, 1.0)
    assert recipe.augment == type(recipe.augment)()  # made images are not augmented


def check_data(source: MosaicSpec, ood: str) -> None:
    assert source.reader is not None and ood in source.reader.shards
    choice = source.selection
    if ood not in SUBSETS:
        assert choice is None
    else:
        assert choice is not None and (choice.kind, choice.score, choice.order) == ("top", "entropy", "highest")
        assert choice.count == SUBSETS[ood] and not choice.balanced
    flips = source.ood_augment.flip
    assert flips == (ood != "svhn")


def check_weights(source: MosaicSpec, **cut: float) -> None:
    """--local 1 --align 1 --adv 1 --balance 10, the last on log2."""
    wanted = {"patch": 1.0, "ice": 1.0, "adv": 1.0, "bce": 10 / math.log(2), "bn": 0.0, "oh": 0.0, "act": 0.0} | cut
    assert source.loss.weights() == pytest.approx(wanted, abs=1e-3)
    assert source.adversary.against == ("none" if cut.get("adv") == 0 else "student")
    assert (source.adversary.form, source.adversary.temperature) == ("kl", 1.0)


@pytest.mark.parametrize(("ood", "pair", "value"), ROWS_1)
def test_a_row_of_table_1(ood: str, pair: str, value: str) -> None:
    for kind in ("paper", "released"):
        recipe, source = load(f"cifar100_from_{ood}_{pair}_{kind}")
        check_values(recipe, ood)
        check_data(source, ood)
        check_weights(source)
        assert value in recipe.about and "Table 1" in recipe.about
        assert f"{recipe.teachers[0].arch}_{recipe.student.arch}" == pair
        judge = source.discriminator
        assert judge is not None
        if kind == "paper":  # Algorithm 1: made images only; patches of 8 px; an expectation over patches
            assert (source.ood_batch, judge.field, judge.reduction, judge.images) == (0, 8, "mean", "fresh")
        else:  # 256 real images too; 10 px; sums; both steps on the same images
            assert (source.ood_batch, judge.field, judge.reduction, judge.images) == (256, 10, "sum", "generator")


@pytest.mark.parametrize(("ood", "size", "value"), ROWS_4)
def test_a_column_of_table_4(ood: str, size: int, value: str) -> None:
    recipe, source = load(of_table_4(ood, size))
    check_values(recipe, ood)
    check_data(source, ood)
    check_weights(source)
    assert value in recipe.about
    assert (recipe.teachers[0].arch, recipe.student.arch) == ("wrn40_2", "wrn16_1")
    assert source.discriminator is not None and source.discriminator.field == size


@pytest.mark.parametrize(("cut", "pair", "value"), ROWS_5)
def test_a_row_of_table_5(cut: str, pair: str, value: str) -> None:
    recipe, source = load(f"cifar100_from_cifar10_{pair}_{cut}_paper")
    check_values(recipe, "cifar10")
    assert value in recipe.about and f"{recipe.teachers[0].arch}_{recipe.student.arch}" == pair
    if cut == "no_disc":
        check_weights(source, patch=0.0)
        assert source.discriminator is None and source.reader is None
        return
    check_data(source, "cifar10")
    check_weights(source, **({"adv": 0.0} if cut == "no_adv" else {}))
    assert source.discriminator is not None and source.discriminator.field == (32 if cut == "no_patch" else 8)


@pytest.mark.parametrize("data", TABLE_3)
def test_a_column_of_table_3(data: str) -> None:
    recipe, source = load(f"{data}_from_places365_paper")
    assert TABLE_3[data] in recipe.about and "our choice" in recipe.about
    check_weights(source)
    choice = source.selection
    assert choice is not None and choice.count == {"cub200": 5994, "dogs": 12000}[data]
    assert recipe.num_classes == {"cub200": 200, "dogs": 120}[data]
    assert recipe.rounds.main == 200 * math.ceil(choice.count / 256)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_small_recipes_fit_a_cpu(data: str) -> None:
    (paper, ours), (released, theirs) = (load(f"cpu_{data}_from_photos_{kind}") for kind in ("paper", "released"))
    assert paper.batch == released.batch == 64 and (ours.ood_batch, theirs.ood_batch) == (0, 64)
    assert paper.rounds == released.rounds and paper.rounds.main * (2 + 5) <= 3000
    check_weights(ours)
    check_weights(theirs)
