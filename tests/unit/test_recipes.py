"""The shipped recipes: all read, the tables' rows hold values typed here from the paper, and the debug ones run."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch

from dfkd_dist.config import (
    AssistantSpec,
    AugmentSpec,
    GenerativeSpec,
    GeneratorLossSpec,
    Recipe,
    TeachersRecipe,
    dump,
    load_recipe,
    load_teachers_recipe,
    read_yaml,
)
from dfkd_dist.engine.build import build
from dfkd_dist.engine.teachers import teacher_cards
from dfkd_dist.models.registry import ZOO
from dfkd_dist.resources import configs_dir

CONFIGS = configs_dir()
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if "_parts" not in p.parts)
OWN = [p for p in FILES if p.parent.name in ("dfmf", "teachers", "baselines", "debug")]
TEACHERS = [p for p in FILES if "archs" in read_yaml(p)]
STUDENTS = [p for p in FILES if p not in TEACHERS]
DEBUG = [p for p in STUDENTS if p.parent.name == "debug"]
FUSIONS = [p for p in STUDENTS if p.parent.name in ("dfmf", "baselines")]

# Table 1, with the fidelity and adversarial terms of section 3 and, for DAFL, its own one-hot form of ICE.
TABLE_1 = {
    "zskt": {"adv"},
    "dafl": {"oh", "bce", "act"},
    "dfq_noadv": {"bn", "ice", "bce"},
    "dfq": {"bn", "ice", "bce", "adv"},
    "dfmf": {"bn", "ice", "bce", "adv"},
}
TABLE_2 = {
    ("cifar10", "bl"): {"zskt": "56.34", "dafl": "89.04", "dfq_noadv": "92.66", "dfq": "90.64", "dfmf": "93.10"},
    ("cifar10", "ibl3"): {"zskt": "63.44", "dafl": "89.76", "dfq_noadv": "91.81", "dfq": "88.12", "dfmf": "92.27"},
    ("cifar100", "bl"): {"zskt": "41.13", "dafl": "67.46", "dfq_noadv": "67.75", "dfq": "57.73", "dfmf": "70.05"},
    ("cifar100", "ibl3"): {"zskt": "36.04", "dafl": "63.98", "dfq_noadv": "66.97", "dfq": "57.26", "dfmf": "69.67"},
}
TABLE_3 = {("bl", "t"): "71.16", ("bl", "s"): "70.50", ("ibl3", "t"): "69.05", ("ibl3", "s"): "67.54"}
TABLE_4 = {
    (2, "bl"): "80.44",
    (2, "ibl3"): "80.78",
    (2, "ibl10"): "79.45",
    (2, "ibl20"): "78.60",
    (4, "bl"): "81.01",
    (4, "ibl3"): "80.75",
    (4, "ibl10"): "78.94",
    (4, "ibl20"): "78.31",
}
RATIO = {"bl": 1, "ibl3": 3, "ibl10": 10, "ibl20": 20}
CLASSES = {"cifar10": 10, "cifar100": 100, "dogs": 120}
ROWS_2 = [(data, split, method) for (data, split), row in TABLE_2.items() for method in row]


def ident(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def dfmf(name: str) -> Recipe:
    return load_recipe(CONFIGS / "dfmf" / f"{name}.yaml")


def generative(recipe: Recipe) -> GenerativeSpec:
    assert isinstance(recipe.source, GenerativeSpec)
    return recipe.source


def assistant(recipe: Recipe) -> AssistantSpec:
    found = generative(recipe).assistant
    assert found is not None
    return found


def terms(loss: GeneratorLossSpec) -> set[str]:
    return {name for name, weight in loss.weights().items() if weight > 0}


def load(path: Path) -> Recipe | TeachersRecipe:
    return load_teachers_recipe(path) if path in TEACHERS else load_recipe(path)


# ------------------------------------------------------------------------------------------ all recipes


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_a_shipped_recipe_reads_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    spec = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(spec))
    assert (load_teachers_recipe if path in TEACHERS else load_recipe)(again) == spec


@pytest.mark.parametrize("path", OWN, ids=ident)
def test_a_recipe_is_called_like_its_file(path: Path) -> None:
    assert load(path).name == (f"debug_{path.stem}" if path.parent.name == "debug" else path.stem)


def test_no_two_recipes_write_to_one_directory() -> None:
    places = [load(path).out.format(name=load(path).name, seed=0) for path in FILES]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("path", FUSIONS, ids=ident)
def test_teachers_are_those_of_a_teachers_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    run = Path(recipe.teachers[0].weights).parent.name
    made = load_teachers_recipe(CONFIGS / "teachers" / f"{run}.yaml")
    archs = made.archs * (made.split.parties if len(made.archs) == 1 else 1)
    assert [t.weights for t in recipe.teachers] == [
        str(made.out_dir() / f"t{k}.safetensors") for k in range(len(archs))
    ]
    assert [t.arch for t in recipe.teachers] == archs
    for teacher in recipe.teachers:
        assert (teacher.size, teacher.channels) == (made.dataset.size, made.dataset.channels)
        assert (teacher.mean, teacher.std) == (made.mean, made.std)
    assert recipe.evaluation is not None and made.dataset.path == recipe.evaluation.dataset.path
    if made.split.parties > 1:
        assert recipe.evaluation.split == made.split


@pytest.mark.parametrize("path", FUSIONS, ids=ident)
def test_a_recipe_is_complete_without_the_weights_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    cards = teacher_cards(recipe)
    assert {card.num_classes for card in cards} == {recipe.num_classes}
    assert all(card.size == recipe.image.size and card.channels == recipe.image.channels for card in cards)
    for arch in [recipe.student.arch, *(card.arch for card in cards)]:
        assert arch in ZOO or arch == "torchvision/resnet18"


@pytest.mark.parametrize("path", DEBUG, ids=ident)
def test_a_debug_recipe_runs(path: Path) -> None:
    labelled = path.stem == "labelled"
    recipe = load_recipe(path, ["rounds.main=2"] if labelled else ["rounds.warmup=1", "rounds.main=1"])
    built = build(recipe, torch.device("cpu"))
    before = [p.detach().clone() for p in built.side.network.parameters()]
    built.trainer.fit()
    assert built.trainer.position.round == 2
    after = list(built.side.network.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_there_is_a_debug_recipe_for_every_method() -> None:
    methods = {load_recipe(path).method for path in FUSIONS}
    assert methods <= {load_recipe(path).method for path in DEBUG}


# ------------------------------------------------------------------------- section 4.1 and Tables 1 to 4


def paper_recipes() -> list[str]:
    hetero = [f"cifar100_hetero_{split}_dfmf_ga_{ga}" for split, ga in TABLE_3]
    dogs = [f"dogs_k{k}_{split}_dfmf" for k, split in TABLE_4]
    mga = [f"{data}_bl_dfmf_mga{n}" for data, n in product(("cifar10", "cifar100"), (1, 2, 10))]
    port = [f"{data}_{split}_dfq_port" for data, split in TABLE_2]
    return [f"{data}_{split}_{method}" for data, split, method in ROWS_2] + hetero + dogs + mga + port


@pytest.mark.parametrize("name", paper_recipes())
def test_section_4_1_holds_for_every_row(name: str) -> None:
    recipe = dfmf(name)
    source, rounds = generative(recipe), recipe.rounds
    data = name.split("_")[0]
    warmup_epochs = 250 if name.endswith("noadv") else 50
    assert (rounds.warmup, rounds.main, rounds.student_steps) == (warmup_epochs * 400, 200 * 400, 10)
    assert recipe.batch == 256
    assert recipe.num_classes == CLASSES[data]
    assert recipe.image.size == (224 if data == "dogs" else 32) and recipe.image.channels == 3
    student = recipe.optimizer
    assert (student.kind, student.lr, student.momentum, student.nesterov) == ("sgd", 0.05, 0.9, True)
    assert (recipe.schedule.kind, recipe.schedule.floor) == ("cosine", 0.0)
    assert (source.optimizer.kind, source.optimizer.lr, source.optimizer.betas[0]) == ("adam", 1e-3, 0.5)
    assert source.generator.blocks == 3
    kd = recipe.objective
    assert (kd.kl, kd.vid, kd.temperature, kd.target) == (1.0, 1.0, 3.0, "mean_probabilities")
    assert (kd.l1, kd.at, kd.kl_scale, kd.kl_direction) == (0.0, 0.0, "none", "forward")
    assert all(teacher.weight is None for teacher in recipe.teachers)  # w_k = 1 / K
    augment = recipe.augment
    assert augment.rotation > 0 and augment.crop_padding > 0 and augment.flip
    assert min(augment.brightness, augment.contrast, augment.saturation, augment.hue) > 0


@pytest.mark.parametrize(("data", "split", "method"), ROWS_2)
def test_a_row_of_table_2(data: str, split: str, method: str) -> None:
    recipe = dfmf(f"{data}_{split}_{method}")
    source = generative(recipe)
    assert TABLE_2[data, split][method] in recipe.about
    assert recipe.student.arch == "resnet18" and [t.arch for t in recipe.teachers] == ["resnet18"] * 2
    assert not recipe.student.pretrained
    assert recipe.evaluation is not None and recipe.evaluation.split is not None
    assert (recipe.evaluation.split.parties, recipe.evaluation.split.ratio) == (2, RATIO[split])
    assert terms(source.loss) == TABLE_1[method]
    assert (source.assistant is not None) == (method == "dfmf")
    assert source.generator.head == ("bn" if method in ("dafl", "zskt") else "sigmoid")


@pytest.mark.parametrize("name", [n for n in paper_recipes() if "dfmf" in n])
def test_dfmf_values(name: str) -> None:
    recipe = dfmf(name)
    source, ga = generative(recipe), assistant(recipe)
    assert source.loss.weights() == {"bn": 0.1, "ice": 0.1, "bce": 0.1, "adv": 1.0, "oh": 0.0, "act": 0.0}
    assert source.warmup_weights() == {"bn": 1.0, "ice": 1.0, "bce": 1.0, "adv": 0.0, "oh": 0.0, "act": 0.0}
    assert source.bn.form == "gaussian_kl"
    adversary = source.adversary
    assert (adversary.against, adversary.form, adversary.temperature) == ("assistant", "kl", 3.0)
    optimizer = ga.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.05, 0.9, True)
    assert ga.schedule.kind == "cosine"
    assert (ga.objective.kl, ga.objective.vid, ga.objective.temperature) == (1.0, 1.0, 3.0)
    assert ga.steps == (int(name.partition("_mga")[2]) if "_mga" in name else 5)
    assert ga.arch == ("student" if name.endswith("ga_s") else "teacher")
    assert not source.freeze_after_warmup


@pytest.mark.parametrize(("split", "ga"), TABLE_3)
def test_a_row_of_table_3(split: str, ga: str) -> None:
    recipe = dfmf(f"cifar100_hetero_{split}_dfmf_ga_{ga}")
    assert TABLE_3[split, ga] in recipe.about
    assert [t.arch for t in recipe.teachers] == ["resnet18", "resnet34"]
    assert recipe.student.arch == "resnet50"
    assert recipe.evaluation is not None and recipe.evaluation.split is not None
    assert recipe.evaluation.split.ratio == RATIO[split]


@pytest.mark.parametrize(("parties", "split"), TABLE_4)
def test_a_row_of_table_4(parties: int, split: str) -> None:
    recipe = dfmf(f"dogs_k{parties}_{split}_dfmf")
    assert TABLE_4[parties, split] in recipe.about
    assert [t.arch for t in recipe.teachers] == ["torchvision/resnet18"] * parties
    assert recipe.student.arch == "torchvision/resnet18"
    assert recipe.student.pretrained and assistant(recipe).pretrained
    assert recipe.evaluation is not None and recipe.evaluation.split is not None
    assert (recipe.evaluation.split.parties, recipe.evaluation.split.ratio) == (parties, RATIO[split])
    assert recipe.evaluation.split.mode == ("bl" if split == "bl" else "ibl")


@pytest.mark.parametrize(("data", "split"), TABLE_2)
def test_the_baselines_of_table_2(data: str, split: str) -> None:
    noadv, dfq = (generative(dfmf(f"{data}_{split}_{m}")) for m in ("dfq_noadv", "dfq"))
    assert noadv.freeze_after_warmup and noadv.adversary.against == "none"
    assert (dfq.adversary.against, dfq.adversary.form) == ("student", "kl")
    zskt, dafl = (generative(dfmf(f"{data}_{split}_{m}")) for m in ("zskt", "dafl"))
    assert (zskt.adversary.against, zskt.adversary.form, zskt.adversary.temperature) == ("student", "kl", 1.0)
    assert (zskt.latents, zskt.warmup_weights()["adv"]) == ("per_round", 1.0)
    # DAFL's weights, its log10 turned into natural logarithms.
    oh, entropy, act = (0.05, 5, 0.01) if data == "cifar10" else (0.5, 20, 0.1)
    assert (dafl.loss.oh, dafl.loss.act) == (oh, act)
    assert dafl.loss.bce == pytest.approx(entropy / math.log(10), abs=1e-4)


# ------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("name", ["cifar10_bl", "cifar10_ibl3", "cifar100_bl", "cifar100_ibl3"])
def test_cifar_teachers_are_trained_as_in_section_4_1(name: str) -> None:
    recipe = load_teachers_recipe(CONFIGS / "teachers" / f"{name}_resnet18.yaml")
    optimizer = recipe.optimizer
    assert (recipe.epochs, recipe.batch, recipe.archs, recipe.pretrained) == (200, 256, ["resnet18"], False)
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.1, 0.9, True)
    assert optimizer.weight_decay == 5e-4
    assert [round(m * recipe.epochs) for m in recipe.schedule.milestones] == [80, 120]
    assert recipe.schedule.gamma == 0.1
    assert (recipe.split.parties, recipe.split.ratio) == (2, RATIO[name.split("_")[1]])
    assert recipe.dataset.val_fraction == 0.0 and recipe.dataset.limit is None


@pytest.mark.parametrize(("parties", "split"), TABLE_4)
def test_dogs_teachers_are_trained_as_in_section_4_1(parties: int, split: str) -> None:
    recipe = load_teachers_recipe(CONFIGS / "teachers" / f"dogs_k{parties}_{split}_resnet18.yaml")
    optimizer = recipe.optimizer
    assert (recipe.epochs, recipe.batch, recipe.pretrained, recipe.dataset.size) == (200, 64, True, 224)
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.01, 0.9, True)
    assert optimizer.weight_decay == 5e-4
    assert [round(m * recipe.epochs) for m in recipe.schedule.milestones] == [50, 100, 150]
    assert (recipe.split.parties, recipe.split.ratio) == (parties, RATIO[split])


def test_the_gold_standards_of_tables_2_and_4_have_a_recipe() -> None:
    for name, arch in (
        ("cifar10_bl_resnet18", "resnet18"),
        ("cifar100_bl_resnet18", "resnet18"),
        ("dogs_k2_bl_resnet18", "torchvision/resnet18"),
    ):
        assert load_teachers_recipe(CONFIGS / "teachers" / f"{name}.yaml").gold == arch


# --------------------------------------------------------------------- small budgets and single teachers


@pytest.mark.parametrize(("data", "ratio"), list(product(("mnist", "cifar10_wrn"), ("ibl3", "ibl20"))))
def test_small_recipes_give_every_method_the_same_budget(data: str, ratio: str) -> None:
    methods = ("dfmf", "dfq", "dfq_noadv", "dafl", "zskt", "dfad")
    recipes = {method: dfmf(f"{data}_{ratio}_{method}") for method in methods}
    updates = set()
    for method, recipe in recipes.items():
        source = generative(recipe)
        assert recipe.objective.vid == 1.0
        trained = 0 if source.freeze_after_warmup else recipe.rounds.main
        updates.add(recipe.rounds.warmup + trained)
        if method != "dfad":
            assert terms(source.loss) == TABLE_1[method]
    assert len(updates) == 1
    assert len({(r.batch, r.rounds.main, r.rounds.student_steps) for r in recipes.values()}) == 1
    assert len({r.augment.model_dump_json() for r in recipes.values()}) == 1
    assert all(r.augment != AugmentSpec() for r in recipes.values())
    flips = {r.augment.flip for r in recipes.values()}
    assert flips == ({False} if data == "mnist" else {True})


def test_the_single_teacher_baselines() -> None:
    dfq, dafl, zskt, dfad = (
        load_recipe(CONFIGS / "baselines" / f"{name}_cifar10.yaml") for name in ("dfq", "dafl", "zskt", "dfad")
    )
    assert all(len(recipe.teachers) == 1 and recipe.rounds.warmup == 0 for recipe in (dfq, dafl, zskt, dfad))
    assert dfq.rounds.main * dfq.rounds.student_steps == 200 * 400 and dfq.rounds.student_steps == 10
    assert (generative(dfq).loss.bn, generative(dfq).loss.oh, generative(dfq).loss.bce) == (1.0, 1.0, 20.0)
    assert (dafl.batch, dafl.rounds.main, dafl.rounds.student_steps) == (1024, 2000 * 120, 1)
    assert [round(m * 2000) for m in dafl.schedule.milestones] == [800, 1600]
    assert (generative(dafl).generator.latent, generative(dafl).optimizer.lr) == (1000, 0.02)
    assert generative(dafl).student_images == "from_update"
    assert (zskt.teachers[0].arch, zskt.student.arch) == ("wrn40_2", "wrn16_1")
    assert (zskt.batch, zskt.rounds.main, zskt.rounds.student_steps) == (128, 80_000, 10)
    assert (zskt.optimizer.kind, zskt.optimizer.lr, zskt.optimizer.clip) == ("adam", 2e-3, 5.0)
    # KL is a mean over batch and 10 classes there: 1 to 250 with the attention term.
    assert (zskt.objective.kl, zskt.objective.at) == (1 / 10, 250.0)
    assert generative(zskt).latents == "per_round" and generative(zskt).optimizer.clip == 5.0
    assert (dfad.rounds.main, dfad.rounds.student_steps, dfad.batch) == (500 * 50, 5, 256)
    assert [round(m * 500) for m in dfad.schedule.milestones] == [100, 200]
    assert generative(dfad).student_first and generative(dfad).adversary.form == "l1"
    assert (dfad.objective.l1, dfad.objective.kl) == (1.0, 0.0)
