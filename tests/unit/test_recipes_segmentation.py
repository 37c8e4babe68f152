"""The shipped recipes for segmentation: they read, hold the values of their papers, and the small ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfkd_dist.config import (
    GenerativeSpec,
    LabelledSpec,
    MosaicSpec,
    Recipe,
    StreamSpec,
    dump,
    load_recipe,
    load_teachers_recipe,
    parse,
)
from dfkd_dist.engine.build import build
from dfkd_dist.engine.teachers import teacher_cards
from dfkd_dist.models.registry import segmenter_names
from dfkd_dist.resources import configs_dir
from tests.shards import write_shards

CONFIGS = configs_dir()
FILES = sorted((CONFIGS / "segmentation").glob("*.yaml"))
TABLE_2 = {"zskt": "0.364", "dafl": "0.105", "kd_imagenet": "0.406", "mosaickd": "0.454"}
METHODS = ["kd", "zskt", "dafl", "dfad", "mosaickd"]


def of(name: str) -> Recipe:
    return load_recipe(CONFIGS / "segmentation" / f"{name}.yaml")


def ident(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_a_recipe_reads_back_equal_and_is_called_like_its_file(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe))
    assert load_recipe(again) == recipe and recipe.name == path.stem


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_teachers_and_tests_are_those_of_a_teachers_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    (teacher,) = recipe.teachers
    made = load_teachers_recipe(CONFIGS / "teachers" / f"{Path(teacher.weights).parent.name}.yaml")
    assert teacher.weights == str(made.out_dir() / "t0.safetensors")
    assert ([teacher.arch], teacher.mean, teacher.std) == (made.archs, made.mean, made.std)
    assert teacher.size == (made.crop or made.dataset.size) == recipe.image.size
    assert recipe.evaluation is not None and recipe.evaluation.dataset == made.dataset
    (card,) = teacher_cards(recipe)
    assert {card.arch, recipe.student.arch} < set(segmenter_names())
    assert card.num_classes == recipe.num_classes
    if made.dataset.classes is not None:
        assert list(card.classes or []) == made.dataset.classes and len(made.dataset.classes) == recipe.num_classes


def test_every_method_is_there_for_both_sets() -> None:
    names = {path.stem for path in FILES}
    assert {f"{data}_{method}" for data in ("nyuv2", "cpu_digits") for method in METHODS} <= names


@pytest.mark.parametrize("row", [*TABLE_2, "dfad", "kd"])
def test_a_row_of_table_2_on_nyuv2(row: str) -> None:
    recipe = of(f"nyuv2_{row}")
    assert (TABLE_2[row] if row in TABLE_2 else "Not in MosaicKD's Table 2") in recipe.about
    assert (recipe.teachers[0].arch, recipe.student.arch) == ("deeplabv3_resnet50", "deeplabv3_mobilenetv2")
    assert not recipe.student.pretrained  # "freshly initialized"
    assert (recipe.num_classes, recipe.image.size, recipe.batch) == (13, 128, 64)
    steps = recipe.rounds.student_steps
    assert isinstance(steps, int) and recipe.rounds.main * steps == 300 * 50 * 5
    assert recipe.evaluation is not None and recipe.evaluation.dataset.size == 256


def test_dfad_is_that_of_its_released_code() -> None:
    recipe = of("nyuv2_dfad")
    source = recipe.source
    assert isinstance(source, GenerativeSpec)
    assert (source.generator.style, source.generator.latent, source.generator.width) == ("dcgan", 256, 512)
    assert (source.adversary.form, source.adversary.batch_norm, source.student_first) == ("log_l1", "batch", True)
    assert source.loss.weights() == dict.fromkeys(source.loss.weights(), 0.0) | {"adv": 1.0}
    assert (recipe.objective.weights()["l1"], recipe.objective.weights()["kl"]) == (1.0, 0.0)
    optimizer = recipe.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.1, 0.9, 5e-5)
    for schedule in (recipe.schedule, source.schedule):
        assert [round(300 * m) for m in schedule.milestones] == [100, 200] and schedule.gamma == 0.3
    assert (source.optimizer.kind, source.optimizer.lr, source.optimizer.betas) == ("adam", 1e-3, [0.9, 0.999])


def test_the_other_rows() -> None:
    zskt, dafl, mosaic = (of(f"nyuv2_{method}").source for method in ("zskt", "dafl", "mosaickd"))
    assert isinstance(zskt, GenerativeSpec) and isinstance(dafl, GenerativeSpec) and isinstance(mosaic, MosaicSpec)
    assert zskt.latents == "per_round" and zskt.loss.adv == pytest.approx(1 / 13, abs=1e-6)
    assert dafl.student_images == "from_update" and dafl.loss.act > 0
    assert (mosaic.loss.patch, mosaic.loss.ice, mosaic.loss.adv, mosaic.ood_batch) == (1.0, 1.0, 1.0, 0)
    assert mosaic.reader is not None and mosaic.selection is None
    kd, original = of("nyuv2_kd_imagenet").source, of("nyuv2_kd").source
    assert isinstance(kd, StreamSpec) and kd.reader == mosaic.reader
    assert isinstance(original, LabelledSpec) and original.crop == 128


def test_nyuv2s_teachers_are_dfads() -> None:
    teacher, student = (
        load_teachers_recipe(CONFIGS / "teachers" / f"nyuv2_single_deeplabv3_{name}.yaml")
        for name in ("resnet50", "mobilenetv2")
    )
    assert (teacher.epochs, teacher.batch, teacher.crop, teacher.pretrained) == (200, 16, 128, True)
    assert (teacher.optimizer.lr, teacher.optimizer.weight_decay) == (0.05, 5e-4)
    assert teacher.dataset == student.dataset and not student.pretrained


@pytest.mark.parametrize("name", ["dfad", "dfad_bn", "zskt", "dafl", "mosaickd", "kd", "kd_photos"])
def test_a_small_recipe_runs(name: str, tmp_path: Path) -> None:
    """Two rounds with an untrained teacher; real photographs and digits are replaced by made up ones."""
    tree = of(f"cpu_digits_{name}").model_dump()
    tree |= {"batch": 8, "evaluation": None, "out": str(tmp_path / "run"), "rounds": {"main": 2, "student_steps": 1}}
    tree["teachers"][0]["weights"] = "random"
    if "reader" in tree["source"]:
        tree["source"]["reader"] |= {"shards": str(write_shards(tmp_path / "shards")), "workers": 0}
    if name == "kd":
        _write_materials(tmp_path)
        tree["source"]["dataset"] |= {"path": str(tmp_path / "d.npz"), "photos": str(tmp_path / "p.npz"), "limit": 16}
    built = build(parse(Recipe, tree), torch.device("cpu"))
    before = [p.detach().clone() for p in built.side.network.parameters()]
    built.trainer.fit()
    after = list(built.side.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _write_materials(folder: Path) -> None:
    from tests.image_data import write_jpg_npz, write_npz

    write_npz(folder / "d.npz")
    write_jpg_npz(folder / "p.npz")
