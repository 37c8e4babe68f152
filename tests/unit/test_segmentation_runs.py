"""Segmentation through the whole system: training, evaluation, reports, refusals; students that learn."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.cli import main
from dfkd_dist.config import Recipe, RecipeError, SplitSpec, TeachersRecipe, parse
from dfkd_dist.data.datasets import to_image_space
from dfkd_dist.data.mask_set import IGNORE, MaskSet
from dfkd_dist.engine import report
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.evaluate import Evaluation, Overlap, best_teacher, check_set, evaluate
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.private_teachers import train_teachers
from dfkd_dist.engine.quality import SYNTHETIC, measure
from dfkd_dist.engine.run import run
from dfkd_dist.engine.tally import PixelTally
from dfkd_dist.models.cards import read_about, read_card
from tests import recipes
from tests.recipes import Tree, merged
from tests.segmentation import (
    CLASSES,
    NAMES,
    SHAPES,
    base,
    dafl,
    dfad,
    kd,
    mask_set,
    shapes_spec,
    supervised,
    write_shapes,
    write_teachers,
)

CPU = torch.device("cpu")


def built(tree: Tree) -> Build:
    return build(parse(Recipe, tree), CPU)


def lively(tree: Tree) -> Build:
    """Untrained students say one class everywhere; this one's logits are centred and scaled."""
    one = built(tree)
    student = one.side.network
    pixels = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        said = student.eval()(pixels).logits_NC
        classifier = student.network.classifier
        scale = 2.0 / said.std(dim=(0, 2, 3)).mean()
        classifier.weight.mul_(scale)  # type: ignore[union-attr,operator]
        classifier.bias.copy_(-scale * said.mean(dim=(0, 2, 3)))  # type: ignore[union-attr,operator]
    student.train()
    return one


# ---------------------------------------------------------------------------------------------- evaluation


def said(one: Build, images: MaskSet) -> tuple[dict[str, Tensor], Tensor]:
    """Every voter's classes `[N, H, W]`, without batches, and the labels."""
    pixels = to_image_space(images.images(torch.arange(len(images))), torch.float64)
    with torch.no_grad():
        probs = torch.stack([t(pixels).logits_NC.softmax(dim=1) for t in one.teachers])
        student = one.side.network.eval()(pixels).logits_NC
        one.side.network.train()
    entropy = -(probs * probs.log()).sum(dim=2)
    surest = torch.where((entropy[0] <= entropy[1])[:, None], probs[0], probs[1])
    voters = {"teacher/t0": probs[0], "teacher/t1": probs[1], "AvgPred": probs.mean(dim=0), "HighestConf": surest}
    choices = {name: p.argmax(dim=1) for name, p in (voters | {"student": student}).items()}
    return choices, images.labels(torch.arange(len(images)))


def naive_iou(choice: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Sets of pixels, as the measure is defined."""
    found: list[float | None] = []
    valid = labels != IGNORE
    for c in range(classes):
        a, b = (choice == c) & valid, (labels == c) & valid
        union = int((a | b).sum())
        found.append(100.0 * int((a & b).sum()) / union if union else None)
    return found


@pytest.mark.parametrize("batch", [4, 64])
def test_miou_is_that_of_plain_sets_of_pixels(tmp_path: Path, batch: int) -> None:
    one, images = lively(dfad(write_teachers(tmp_path, 2))), mask_set(13)
    found = evaluate(one, images, "test", batch=batch, parties=None)
    choices, labels = said(one, images)
    valid = labels != IGNORE
    assert set(found.overlaps) == set(choices) and found.samples == 13 and found.frequent == {}
    values = dict(found.items())
    for name, choice in choices.items():
        expected = naive_iou(choice, labels, CLASSES)
        assert list(found.overlaps[name].iou) == NAMES
        assert list(found.overlaps[name].iou.values()) == pytest.approx(expected, rel=1e-6)
        known = [value for value in expected if value is not None]
        assert values[f"test/{name}/miou"] == pytest.approx(sum(known) / len(known), rel=1e-6)
        assert values[f"test/{name}"] == pytest.approx(100 * float((choice == labels)[valid].double().mean()))
    assert len({round(v, 6) for v in values.values()}) == len(values)  # the voters can be told apart


def test_classes_that_occur_nowhere_do_not_count() -> None:
    tally = PixelTally(["student"], ["a", "b", "c", "d"], CPU)
    labels = torch.tensor([[[0, 0, 1], [IGNORE, IGNORE, 1]]])
    choice = torch.tensor([[[0, 1, 1], [3, 3, 2]]])
    tally.add([choice], labels)
    overlap = tally.evaluation("test").overlaps["student"]
    # a: 1 of 2; b: 1 of 3; c: predicted once, never true; d: predicted on ignored pixels only.
    assert overlap.iou == {"a": pytest.approx(50), "b": pytest.approx(100 / 3), "c": 0.0, "d": None}
    assert overlap.miou == pytest.approx((50 + 100 / 3) / 3)


def test_torchmetrics_says_the_same() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    g = torch.Generator().manual_seed(0)
    labels, choice = torch.randint(0, 6, (4, 9, 9), generator=g), torch.randint(0, 6, (4, 9, 9), generator=g)
    labels[0, :4] = IGNORE
    tally = PixelTally(["student"], [str(c) for c in range(7)], CPU)
    for part in range(4):
        tally.add([choice[part : part + 1]], labels[part : part + 1])
    expected = multiclass_jaccard_index(choice, labels, num_classes=7, average="macro", ignore_index=IGNORE)
    assert tally.evaluation("test").overlaps["student"].miou == pytest.approx(100 * expected.item(), rel=1e-6)


def test_labels_follow_the_names_of_the_classes(tmp_path: Path) -> None:
    one, images = lively(dfad(write_teachers(tmp_path, 2))), mask_set(6)
    order = [2, 0, 3, 1, 4]
    table = torch.cat([torch.tensor(order).argsort(), torch.arange(CLASSES, 256)]).to(torch.uint8)
    other = MaskSet(images.images_NCHW, table[images.masks_NHW.long()], [NAMES[c] for c in order])
    first, second = (evaluate(one, s, "test", batch=4, parties=None) for s in (images, other))
    assert first == second


def test_images_of_another_size_than_the_canonical_one(tmp_path: Path) -> None:
    one = lively(dfad(write_teachers(tmp_path, 2)))
    found = evaluate(one, mask_set(3, size=20), "test", batch=2, parties=None)
    assert found.samples == 3 and 0 < found.student < 100


def test_sets_of_the_other_task_are_refused(tmp_path: Path) -> None:
    from tests.voters import image_set

    segmenters = built(dfad(write_teachers(tmp_path, 1)))
    with pytest.raises(ValueError, match="its images have labels, but tinyseg classifies pixels"):
        evaluate(segmenters, image_set(4), "test", batch=4, parties=None)
    classifiers = built(recipes.dfad(recipes.random_teachers(1)))
    with pytest.raises(ValueError, match="its pixels have labels, but tiny classifies images"):
        evaluate(classifiers, mask_set(4), "test", batch=4, parties=None)


def test_a_missing_extra_is_noticed_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_shapes(tmp_path / "set", train=4, test=2)
    tree = dfad(recipes_random(1), evaluation={"dataset": shapes_spec(root, size=8, classes=[*SHAPES, "e"])})
    one, found = built(tree), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torchmetrics":
            raise ImportError("no torchmetrics")
        return found(name, *args, **kwargs)

    check_set(one)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"dfkd-dist\[metrics\]"):
        check_set(one)


def recipes_random(count: int) -> list[Tree]:
    return [{"name": f"t{k}", "weights": "random", "arch": ("tinyseg", "smallseg")[k % 2]} for k in range(count)]


def test_the_best_teacher_is_the_one_with_the_best_overlap() -> None:
    def of(a: float, b: float) -> Evaluation:
        overlaps = {f"teacher/{n}": Overlap(v, {}) for n, v in (("a", a), ("b", b))}
        return Evaluation("val", 3, 1.0, {"a": 90.0, "b": 10.0}, overlaps=overlaps)

    found = best_teacher(of(20.0, 30.0), of(44.0, 33.0))
    assert (found.name, found.validation, found.accuracy) == ("b", 30.0, 33.0)


# ------------------------------------------------------------------------------------------------- quality


def test_agreement_is_counted_by_pixels(tmp_path: Path) -> None:
    one = lively(dafl(write_teachers(tmp_path, 2)))
    found = measure(one, per_generator=5, batch=3)[SYNTHETIC]
    pixels = torch.cat([one.source.sample(kit, 5) for kit in one.source.kits])  # type: ignore[attr-defined]
    with torch.no_grad():
        ensemble = torch.stack([t(pixels).logits_NC.softmax(dim=1) for t in one.teachers]).mean(dim=0)
        student = one.side.network.eval()(pixels).logits_NC
    same = (ensemble.argmax(dim=1) == student.argmax(dim=1)).double()
    divergence = (ensemble * (ensemble.log() - student.log_softmax(dim=1))).sum(dim=1)
    assert found.of_pixels and found.overall.images == 10
    assert found.overall.agreement == pytest.approx(100 * float(same.mean()))
    assert found.overall.kl == pytest.approx(float(divergence.mean()))
    shares = [part.images for part in found.by_class]
    assert sum(shares) == pytest.approx(10) and sum(share > 0 for share in shares) > 1
    first = ensemble.argmax(dim=1) == 0
    assert shares[0] == pytest.approx(int(first.sum()) / 64)


# ----------------------------------------------------------------------------------------------- refusals


def test_what_a_run_on_pixels_cannot_be(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=12, test=2)
    pixels, whole = recipes_random(1), recipes.random_teachers(1)
    labelled = {"kind": "labelled", "dataset": {"kind": "digits", "size": 8, "channels": 3}}
    wrong: list[tuple[Tree, str]] = [
        (dfad(whole), "student classifies pixels, but a teacher of it images"),
        (dfad(pixels, student={"arch": "tiny"}), "student classifies images, but a teacher of it pixels"),
        (dfad(pixels, student={"size": 12}), "student.size is 12; allowed: image.size .8."),
        (dfad(pixels, num_classes=300), "num_classes is 300; allowed in maps of labels: up to 255"),
        (dfad(pixels, objective={"rkd_d": 1.0}), "objective.rkd_d is 1, which relates whole images"),
        (kd(root, pixels) | {"source": labelled}, "source.dataset.kind is digits, whose images have labels"),
        (merged(supervised(root), {"student": {"arch": "tiny"}}), "is masks, whose pixels have labels, but student"),
    ]
    for tree, message in wrong:
        with pytest.raises(RecipeError, match=message):
            built(tree)


def test_other_objectives_and_compensation_are_refused(tmp_path: Path) -> None:
    tree = dfad(recipes_random(1))
    tree["objective"] = {"kind": "noisy"}
    with pytest.raises(
        RecipeError, match="objective.kind is noisy, which compares whole images; allowed: distillation"
    ):
        built(tree)
    with pytest.raises(RecipeError, match="compensation"):
        built(dfad(recipes_random(1), compensation={"kind": "kdci"}))


def test_a_crop_is_the_size_of_the_images(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=12, test=2)
    with pytest.raises(RecipeError, match="source.crop is 12, but image.size is 16"):
        parse(Recipe, supervised(root, source={"crop": 12}))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tree", [dfad(recipes_random(2)), dafl(recipes_random(2))], ids=["dfad", "dafl"])
def test_data_free_runs_train_everything(tree: Tree) -> None:
    one = built(merged(tree, {"precision": {"train": "fp32", "teacher": "fp32"}}))
    players = [one.trainer.student, *one.source.players]  # type: ignore[attr-defined]
    before = [[p.detach().clone() for p in player.parameters] for player in players]
    one.trainer.fit()
    for player, old in zip(players, before, strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(player.parameters, old, strict=True)]
        assert all(p.isfinite().all() for p in player.parameters) and sum(moved) > 0.8 * len(moved)


def test_bf16_and_channels_last(tmp_path: Path) -> None:
    precision = {"train": "bf16", "teacher": "bf16", "channels_last": True}
    one = built(dafl(recipes_random(1), precision=precision))
    one.trainer.fit()
    assert all(p.isfinite().all() for p in one.side.network.parameters())


def test_a_plan_knows_labels_of_pixels_and_larger_answers(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=12, test=2)
    found = plan(parse(Recipe, supervised(root, precision={"train": "fp32", "teacher": "fp32"})), 2)
    assert found.roles[0].memory.peak > 0
    dense = plan(parse(Recipe, dfad(recipes_random(2))), 2)
    assert dense.roles[0].total_flops() > 0


def teachers_recipe(root: Path, out: Path, **changes: Any) -> Tree:
    return {
        "name": "shapes",
        "out": str(out),
        "dataset": shapes_spec(root, val_fraction=0.0),
        "split": {"parties": 1},
        "archs": ["smallseg"],
        "epochs": 25,
        "batch": 16,
        "optimizer": {"lr": 0.1, "nesterov": True},
        "schedule": {"kind": "cosine"},
        "augment": {"crop_padding": 2},
        **changes,
    }


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Figures on noise, and a teacher of them."""
    folder = tmp_path_factory.mktemp("taught")
    root = write_shapes(folder / "set", train=64, test=30)
    train_teachers(parse(TeachersRecipe, teachers_recipe(root, folder / "teachers")))
    return root, folder / "teachers"


def test_a_teacher_of_pixels_is_trained_from_labels(taught: tuple[Path, Path]) -> None:
    about, card = read_about(taught[1] / "t0.safetensors"), read_card(taught[1] / "t0.safetensors")
    print(about)
    assert about["miou"] > 70 and about["accuracy"] > 90 and about["frequent_accuracy"] is None
    assert (card["arch"], card["classes"], card["size"]) == ("smallseg", SHAPES, 16) and card["frequent"] is None
    summary = json.loads((taught[1] / "runs" / "t0" / "summary.json").read_text())
    assert set(summary["student"]["iou"]) == set(SHAPES) and summary["student"]["miou"] == about["miou"]
    assert "frequent" not in summary["student"]


def student_of(taught: tuple[Path, Path], out: Path, **changes: Any) -> Tree:
    root, teachers = taught
    tree = {
        "name": "student",
        "method": "KD",
        "out": str(out),
        "image": {"size": 16, "channels": 3},
        "num_classes": len(SHAPES),
        "batch": 16,
        "rounds": {"main": 120},
        "teachers": [{"name": "t0", "weights": str(teachers / "t0.safetensors")}],
        "student": {"arch": "tinyseg"},
        "optimizer": {"lr": 0.1, "nesterov": True},
        "objective": {"kl": 1.0, "temperature": 1.0},
        "source": {"kind": "labelled", "dataset": shapes_spec(root, val_fraction=0.0)},
        "evaluation": {"dataset": shapes_spec(root), "every": 60},
        "checkpoint": {"every": 0},
        "log": {"every": 20, "grids": False},
    }
    return merged(tree, changes)


def test_pixel_wise_kd_makes_a_student_that_segments(taught: tuple[Path, Path], tmp_path: Path) -> None:
    tree = student_of(taught, tmp_path / "run")
    untrained = evaluate(built(tree), parse(Recipe, tree).evaluation.dataset, "test", batch=16, parties=None)  # type: ignore[union-attr]
    code, summary = run(parse(Recipe, tree), device="cpu")
    assert code == 0 and summary is not None
    student, teacher = summary["student"], summary["teachers"][0]
    print(untrained.overlaps["student"].miou, student["miou"], teacher["miou"])
    assert untrained.overlaps["student"].miou < 30 < 55 < student["miou"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["student/kl"] for line in lines]
    assert losses[-1] < losses[0] / 3
    assert [line["test/student/miou"] for line in lines if "test/student/miou" in line][-1] == pytest.approx(
        student["miou"]
    )
    card = read_about(tmp_path / "run" / "student.safetensors")
    assert card["miou"] == student["miou"]
    table = report.summary_table(summary).split("\n")
    assert table[0].split() == ["network", "parameters", "accuracy", "mIoU"]
    assert table[1].split()[-4:-1:2] == [f"{teacher['accuracy']:.2f}", f"{teacher['miou']:.2f}"]
    assert "of the pixels of 30 supplied images" in "\n".join(table)
    assert summary["best_teacher"]["name"] == "t0"


def test_a_student_learns_to_segment_without_any_image(taught: tuple[Path, Path], tmp_path: Path) -> None:
    """DFAD's game with the batch-norm and balance terms; alone, it stays with the commonest class so early."""
    source = dfad([])["source"] | {"loss": {"adv": 1.0, "bce": 2.0, "bn": 1.0}}
    source["generator"] = {"style": "dcgan", "latent": 32, "width": 32, "blocks": 2}
    tree = student_of(taught, tmp_path / "run", rounds={"main": 25, "student_steps": 5})
    tree |= {"source": source, "objective": {"kl": 0.0, "l1": 1.0}, "method": "DFAD"}
    one, spec = built(tree), parse(Recipe, tree).evaluation
    assert spec is not None
    before = measure(one, per_generator=16)[SYNTHETIC].overall
    one.trainer.fit()
    after = measure(one, per_generator=16)[SYNTHETIC].overall
    overlap = evaluate(one, spec.dataset, "test", batch=16, parties=None).overlaps["student"]
    print(before, after, overlap)
    assert before.agreement is not None and after.agreement is not None and after.agreement > before.agreement + 30
    assert overlap.miou > 35  # one class everywhere gives 20.6


def test_the_commands_print_the_overlap(taught: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    root, _ = taught
    recipe = tmp_path / "teachers.yaml"
    tree = teachers_recipe(root, tmp_path / "out", archs=["tinyseg"], epochs=1, dataset=shapes_spec(root, limit=20))
    recipe.write_text(json.dumps(tree))
    assert main(["teachers", "train", str(recipe)]) == 0
    assert ", mIoU " in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "out" / "runs" / "t0"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "test/student " in printed and "test/student/miou" in printed


def test_parties_of_pixels_are_even(taught: tuple[Path, Path], tmp_path: Path) -> None:
    tree = teachers_recipe(taught[0], tmp_path, archs=["tinyseg"], epochs=1, split={"parties": 2})
    made = train_teachers(parse(TeachersRecipe, tree))
    assert [one["images"] for one in made] == [32, 32] and all(one["frequent_accuracy"] is None for one in made)
    tree = teachers_recipe(taught[0], tmp_path / "b", split={"mode": "ibl", "parties": 2, "ratio": 3.0})
    with pytest.raises(RecipeError, match="split.mode is ibl"):
        train_teachers(parse(TeachersRecipe, tree))
    assert SplitSpec(parties=2).mode == "bl" and base([])["num_classes"] == CLASSES


def test_teachers_learn_from_windows_and_answer_for_whole_images(taught: tuple[Path, Path], tmp_path: Path) -> None:
    tree = teachers_recipe(taught[0], tmp_path, archs=["tinyseg"], epochs=2, crop=12)
    (one,) = train_teachers(parse(TeachersRecipe, tree))
    card = read_card(Path(one["file"]))
    assert card["size"] == 12 and one["miou"] > 0
