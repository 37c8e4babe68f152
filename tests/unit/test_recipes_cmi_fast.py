"""CMI's and Fast's shipped recipes: every row of the tables, values typed here from papers and released scripts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from dfkd_dist.config import AugmentSpec, CMISpec, FastSpec, InversionSpec, Recipe, load_recipe, load_teachers_recipe
from dfkd_dist.engine.teachers import teacher_cards
from dfkd_dist.models.registry import build_network
from dfkd_dist.resources import configs_dir

CONFIGS = configs_dir()
FILES = sorted(p for m in ("cmi", "fast", "cpu_cmi", "cpu_fast") for p in (CONFIGS / "inversion").glob(f"{m}*.yaml"))
PAIRS = ["resnet34_resnet18", "vgg11_bn_resnet18", "wrn40_2_wrn16_1", "wrn40_2_wrn40_1", "wrn40_2_wrn16_2"]
SETS = ["cifar10", "cifar100"]
CMI = {
    "cifar10": ["94.84", "91.13", "90.01", "92.78", "92.52"],
    "cifar100": ["77.04", "70.56", "57.91", "68.88", "68.75"],
}
FAST = {
    (2, "cifar10"): ["92.62", "84.67", "88.36", "89.56", "89.68"],
    (5, "cifar10"): ["93.63", "89.94", "88.90", "92.04", "91.96"],
    (10, "cifar10"): ["94.05", "90.53", "89.29", "92.51", "92.45"],
    (2, "cifar100"): ["69.76", "62.83", "41.77", "53.15", "57.08"],
    (5, "cifar100"): ["72.82", "65.28", "52.90", "61.80", "63.83"],
    (10, "cifar100"): ["74.34", "67.44", "54.02", "63.91", "65.12"],
}
# KDCI's Table 1: the method alone, and compensated.
KDCI = {
    ("fast", "cifar10", ""): ["94.05", "90.53", "89.29", "92.51", "92.45"],
    ("fast", "cifar10", "_compensated"): ["94.56", "91.16", "89.62", "93.09", "92.85"],
    ("fast", "cifar100", ""): ["74.34", "67.44", "54.02", "63.91", "65.12"],
    ("fast", "cifar100", "_compensated"): ["75.10", "68.97", "54.69", "67.09", "68.12"],
    ("cmi", "cifar10", ""): ["94.24", "91.24", "89.16", "91.93", "92.00"],
    ("cmi", "cifar10", "_compensated"): ["94.43", "91.28", "89.52", "92.84", "92.73"],
    ("cmi", "cifar100", ""): ["74.64", "66.68", "55.28", "63.44", "64.22"],
    ("cmi", "cifar100", "_compensated"): ["75.07", "69.07", "57.19", "67.47", "67.68"],
}
# DFMF's Table 2, CMI and CMI (w/ GA), and Table 4, CMI (w/ GA).
TABLE_2 = {
    ("cifar10", "bl"): ("92.89", "92.99"),
    ("cifar10", "ibl3"): ("91.74", "92.02"),
    ("cifar100", "bl"): ("68.46", "69.10"),
    ("cifar100", "ibl3"): ("67.57", "68.32"),
}
TABLE_4 = {
    (2, "bl"): "75.60",
    (2, "ibl3"): "75.11",
    (2, "ibl10"): "73.34",
    (2, "ibl20"): "72.65",
    (4, "bl"): "76.22",
    (4, "ibl3"): "76.11",
    (4, "ibl10"): "74.33",
    (4, "ibl20"): "73.64",
}
# adv and the weight of the labels in the released command, by teacher.
RELEASED = {"resnet34": (1.33, 0.5), "vgg11_bn": (1.0, 0.5), "wrn40_2": (1.1, 0.4)}
RATES = {2: (5e-3, 0.015), 5: (3e-3, 0.01), 10: (2e-3, 0.01)}
CROP_4 = AugmentSpec(crop_padding=4, flip=True)


def load(name: str) -> Recipe:
    folder, _, stem = name.partition("/")
    recipe = load_recipe(CONFIGS / folder / f"{stem}.yaml")
    assert recipe.name == stem
    return recipe


def cmi(recipe: Recipe) -> CMISpec:
    assert isinstance(recipe.source, InversionSpec) and isinstance(recipe.source.synthesis, CMISpec)
    return recipe.source.synthesis


def fast(recipe: Recipe) -> FastSpec:
    assert isinstance(recipe.source, InversionSpec) and isinstance(recipe.source.synthesis, FastSpec)
    return recipe.source.synthesis


def distils(recipe: Recipe, temperature: float) -> bool:
    """Plain KL; at a temperature multiplied by its square."""
    objective = recipe.objective
    weights = {name: weight for name, weight in objective.weights().items() if weight > 0}
    return (weights, objective.temperature, objective.kl_scale) == (  # type: ignore[union-attr]
        {"kl": 1.0},
        temperature,
        "none" if temperature == 1 else "tau2",
    )


def sgd(recipe: Recipe) -> tuple[str, float, float, bool, float]:
    o = recipe.optimizer
    return o.kind, o.lr, o.momentum, o.nesterov, o.weight_decay


def check_cmi(spec: CMISpec) -> None:
    """What all of them share."""
    assert (spec.lr, spec.betas, spec.labels, spec.keep) == (1e-3, [0.5, 0.999], "random", "best")
    g, c, a = spec.generator, spec.contrast, spec.adversary
    assert (g.latent, g.width, g.head, spec.bn.form) == (256, 128, "sigmoid", "l2")
    assert (c.dim, c.bank, c.negatives, c.lr) == (256, 40_960, 4096, None)
    assert (a.form, a.temperature, a.batch_norm) == ("masked_kl", 1.0, "eval")
    assert spec.local_view == AugmentSpec(resized_crop=0.25, flip=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_called_like_its_file_and_its_teachers_have_one(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.out == "runs/{name}/seed{seed}"
    cards = teacher_cards(recipe)
    assert {card.num_classes for card in cards} == {recipe.num_classes}
    if "imagenet" not in path.stem or "tiny" in path.stem:
        run = Path(recipe.teachers[0].weights).parent.name
        made = load_teachers_recipe(CONFIGS / "teachers" / f"{run}.yaml")
        assert (made.mean, made.std, made.dataset.size) == (
            recipe.teachers[0].mean,
            recipe.teachers[0].std,
            recipe.teachers[0].size,
        )
    spec = recipe.source.synthesis  # type: ignore[union-attr]
    for layer in (spec.contrast.layers or []) if isinstance(spec, CMISpec) else []:
        build_network(str(recipe.teachers[0].arch), num_classes=10).get_submodule(layer)


def test_no_recipe_is_without_a_row_here() -> None:
    known = [f"cmi_{d}_{p}{s}" for d, p, s in product(SETS, PAIRS, ("", "_scratch"))]
    known += [f"fast{k}_{d}_{p}" for (k, d), p in product(FAST, PAIRS)]
    known += [f"{m}_kdci_{d}_{p}{s}" for (m, d, s), p in product(KDCI, PAIRS)]
    known += [f"fast_kdci_tinyimagenet_resnet34_resnet18{s}" for s in ("", "_compensated")]
    known += [f"fast50_imagenet_resnet50_{s}" for s in ("resnet50", "resnet18", "mobilenetv2")]
    known += [f"fast50_imagenet_resnet50_{s}_compensated" for s in ("resnet18", "mobilenetv2")]
    known += ["fast10_cifar10_ibl3", "cpu_cmi_cifar10", "cpu_fast_cifar10", "cpu_fast_mnist_ibl3"]
    assert sorted(known) == sorted(path.stem for path in FILES)


@pytest.mark.parametrize(("data", "n"), list(product(SETS, range(5))))
def test_cmis_table(data: str, n: int) -> None:
    """50,000 images without the student, then 40 rounds against it; and the released run without images made before."""
    recipe = load(f"inversion/cmi_{data}_{PAIRS[n]}")
    assert CMI[data][n] in recipe.about
    spec = cmi(recipe)
    check_cmi(spec)
    assert (spec.iterations, spec.contrast.temperature, spec.global_view) == (500, 0.1, CROP_4)
    assert spec.loss.weights() == {"bn": 1.0, "ce": 0.5, "oh": 0.0, "adv": 0.5, "cr": 0.8}
    assert spec.weights_in(0, 196) == {"bn": 1.0, "ce": 1.0, "oh": 0.0, "adv": 0.0, "cr": 0.8}
    rounds = recipe.rounds
    assert (rounds.warmup * recipe.source.per_round(recipe.batch), rounds.main, rounds.student_steps) == (  # type: ignore[union-attr]
        50_176,
        40,
        2000,
    )
    assert recipe.schedule.milestones == [25 / 40, 30 / 40, 35 / 40]
    assert recipe.batch == 128 and distils(recipe, 20.0) and sgd(recipe) == ("sgd", 0.1, 0.9, False, 1e-4)
    stages = [f"layer{k}" for k in range(1, 5)] if PAIRS[n].startswith("resnet34") else None
    assert spec.contrast.layers == stages and recipe.augment == CROP_4
    scratch = load(f"inversion/cmi_{data}_{PAIRS[n]}_scratch")
    assert cmi(scratch).loss.weights() == {"bn": 1.0, "ce": 1.0, "oh": 0.0, "adv": 0.5, "cr": 0.8}
    assert (cmi(scratch).iterations, scratch.rounds.warmup, scratch.rounds.main) == (200, 0, 200)
    assert scratch.schedule.milestones == [120 / 200, 150 / 200, 180 / 200] and scratch.rounds.student_steps == 400


@pytest.mark.parametrize(("k", "data", "n"), [(*row, n) for row, n in product(FAST, range(5))])
def test_fasts_table(k: int, data: str, n: int) -> None:
    recipe = load(f"inversion/fast{k}_{data}_{PAIRS[n]}")
    assert FAST[k, data][n] in recipe.about
    spec, (adv, labels) = fast(recipe), RELEASED[PAIRS[n].rsplit("_", 2 if "wrn" in PAIRS[n] else 1)[0]]
    assert (spec.iterations, spec.lr, spec.lr_latents) == (k, *RATES[k])
    assert spec.loss.weights() == {"bn": 10.0, "ce": labels, "oh": 0.0, "adv": adv}
    assert (spec.bn_momentum, spec.bn.form, spec.keep, spec.latents) == (0.9, "l2", "best", "fresh")
    assert (spec.meta.gradient, spec.meta.lr, spec.betas) == ("sum", None, [0.5, 0.999])
    # The released code counts rounds from 1: its 20th is the first with the adversary, its 140th resets.
    assert (spec.adv_from, spec.reset_at, spec.view) == (19, 139, CROP_4)
    rounds = recipe.rounds
    assert (rounds.warmup, rounds.main, rounds.student_steps, recipe.batch) == (20, 200, 400, 256)
    assert distils(recipe, 20.0) and sgd(recipe) == ("sgd", 0.2, 0.9, False, 1e-4)
    assert recipe.schedule.kind == "cosine" and recipe.schedule.floor * 0.2 == pytest.approx(2e-4)
    assert (spec.generator.latent, spec.generator.width, spec.generator.blocks) == (256, 128, 2)


@pytest.mark.parametrize(("method", "data", "suffix", "n"), [(*row, n) for row, n in product(KDCI, range(5))])
def test_kdcis_table(method: str, data: str, suffix: str, n: int) -> None:
    """Appendix G: its own weights, no temperature; 32 prototypes for model inversion, 8 for generators."""
    recipe = load(f"inversion/{method}_kdci_{data}_{PAIRS[n]}{suffix}")
    assert KDCI[method, data, suffix][n] in recipe.about
    assert distils(recipe, 1.0) and sgd(recipe) == ("sgd", 0.1, 0.9, False, 1e-4)
    spec = cmi(recipe) if method == "cmi" else fast(recipe)
    assert spec.lr == 1e-3 and spec.adversary.against == "student"
    weights = {
        "cmi": {"bn": 1.0, "ce": 0.5, "oh": 0.0, "adv": 0.5, "cr": 0.8},
        "fast": {"bn": 10.0, "ce": 0.4, "oh": 0.0, "adv": 1.1},
    }
    assert spec.loss.weights() == weights[method]
    if suffix:
        assert recipe.compensation is not None and recipe.compensation.size == {"cmi": 32, "fast": 8}[method]
    else:
        assert recipe.compensation is None
    assert recipe.rounds.main == 200 and recipe.rounds.warmup == {"cmi": 0, "fast": 20}[method]


def test_fast_on_larger_images() -> None:
    for suffix, value in (("", "28.79"), ("_compensated", "38.23")):
        tiny = load(f"inversion/fast_kdci_tinyimagenet_resnet34_resnet18{suffix}")
        assert value in tiny.about and tiny.optimizer.lr == 0.2 and tiny.batch == 256 and tiny.rounds.main == 200
    values = {"resnet50": ("68.61",), "resnet18": ("53.45", "58.24"), "mobilenetv2": ("43.02", "50.12")}
    for student, row in values.items():
        for suffix, value in zip(("", "_compensated"), row, strict=False):
            recipe = load(f"inversion/fast50_imagenet_resnet50_{student}{suffix}")
            spec = fast(recipe)
            assert value in recipe.about and recipe.student.arch.startswith(f"torchvision/{student[:9]}")
            assert (recipe.compensation is not None) == bool(suffix)
    assert (spec.iterations, spec.lr, spec.lr_latents, spec.keep) == (50, 2e-4, 0.01, "last")
    meta = spec.meta
    assert (meta.gradient, meta.scale, meta.lr, meta.lr_latents) == ("reptile", 1.0, 1e-4, 5e-3)
    assert spec.loss.weights() == {"bn": 0.1, "ce": 0.1, "oh": 0.0, "adv": 0.1}
    assert (spec.latents, spec.redraw_every, spec.reset_at, spec.bn_momentum) == ("persistent", 50, None, 0.9)
    assert (spec.generator.style, spec.generator.blocks) == ("spatial", 4)
    assert spec.view == recipe.augment == AugmentSpec(resized_crop=0.75, flip=True)
    assert (recipe.rounds.main, recipe.rounds.student_steps, recipe.batch) == (400 * 10, 100, 100)
    assert recipe.rounds.warmup * recipe.batch == 140_000 and distils(recipe, 5.0)


@pytest.mark.parametrize(("row", "ga"), list(product(TABLE_2, (False, True))))
def test_dfmfs_table_2(row: tuple[str, str], ga: bool) -> None:
    recipe = load(f"dfmf/{'_'.join(row)}_cmi{'_ga' if ga else ''}")
    assert TABLE_2[row][ga] in recipe.about and recipe.method == ("CMI (w/ GA)" if ga else "CMI")
    check_dfmf(recipe, ga)
    assert cmi(recipe).global_view == recipe.augment == CROP_4


@pytest.mark.parametrize(("parties", "split"), TABLE_4)
def test_dfmfs_table_4(parties: int, split: str) -> None:
    recipe = load(f"dfmf/dogs_k{parties}_{split}_cmi_ga")
    assert TABLE_4[parties, split] in recipe.about and len(recipe.teachers) == parties
    check_dfmf(recipe, ga=True)
    assert recipe.source.assistant.pretrained and recipe.student.pretrained  # type: ignore[union-attr]


def check_dfmf(recipe: Recipe, ga: bool) -> None:
    """The script for CMI in the repository that DFMF cites; 200 iterations of the assistants, 400 of the student."""
    spec, source = cmi(recipe), recipe.source
    check_cmi(spec)
    assert (spec.iterations, spec.contrast.temperature, recipe.batch) == (200, 0.2, 256)
    assert spec.loss.weights() == {"bn": 1.0, "ce": 1.0, "oh": 0.0, "adv": 0.5, "cr": 0.8}
    assert (recipe.rounds.warmup, recipe.rounds.main, recipe.rounds.student_steps) == (0, 200, 400)
    assert distils(recipe, 20.0) and sgd(recipe) == ("sgd", 0.1, 0.9, False, 1e-4)
    assert isinstance(source, InversionSpec) and spec.adversary.against == ("assistant" if ga else "student")
    if ga:
        assert source.assistant is not None
        objective, optimizer = source.assistant.objective, source.assistant.optimizer
        assert (source.assistant.steps, source.assistant.arch) == (200, "teacher")
        assert (objective.kl, objective.vid, objective.temperature) == (1.0, 1.0, 3.0)
        assert (optimizer.lr, optimizer.momentum, optimizer.nesterov) == (0.05, 0.9, True)


@pytest.mark.parametrize("name", ["mnist_ibl3_cmi", "mnist_ibl3_cmi_ga", "mnist_ibl20_cmi", "mnist_ibl20_cmi_ga"])
def test_the_cpu_budget_is_the_other_methods(name: str) -> None:
    recipe, other = load(f"dfmf/{name}"), load(f"dfmf/{name.split('_cmi')[0]}_dfmf")
    steps = [int(r.rounds.main) * int(r.rounds.student_steps) for r in (recipe, other)]
    assert steps[0] == steps[1] and recipe.batch == other.batch and recipe.augment == other.augment
    assert recipe.objective == other.objective and recipe.optimizer == other.optimizer
    assert [t.weights for t in recipe.teachers] == [t.weights for t in other.teachers]
