"""Accuracy, ensembles, best teacher and data-free quality of one process, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.config import LabelledSpec, Recipe, SplitSpec, parse
from dfkd_dist.data.datasets import ImageSet, MemoryImageSet, to_image_space
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.evaluate import BestTeacher, Evaluation, best_teacher, evaluate, votes
from dfkd_dist.engine.quality import SUPPLIED, SYNTHETIC, measure
from tests.image_data import pictures, write_npz
from tests.recipes import NAMES, base, dfmf, write_teachers
from tests.voters import image_set, speak_up

CPU = torch.device("cpu")


def built(folder: Path, teachers: int = 3, **changes: Any) -> Build:
    return speak_up(build(parse(Recipe, dfmf(write_teachers(folder, teachers), **changes)), CPU))


def labelled(path: Path) -> Build:
    dataset = {"kind": "npz", "path": str(path), "size": 8, "channels": 3}
    tree = base([], batch=4, rounds={"warmup": 0}, objective={"kl": 0.0, "ce": 1.0})
    tree["source"] = {"kind": "labelled", "dataset": dataset}
    return build(parse(Recipe, tree), CPU)


def plainly(one: Build, images: ImageSet) -> dict[str, torch.Tensor]:
    """Which images each voter gets right, without batches."""
    pixels = to_image_space(images.images(torch.arange(len(images))), torch.float64)
    with torch.no_grad():
        said = [teacher(pixels).logits_NC.softmax(dim=1) for teacher in one.teachers]
        student = one.side.network.eval()(pixels).logits_NC
        one.side.network.train()
    stacked = torch.stack(said)
    entropy_KN = torch.distributions.Categorical(probs=stacked).entropy()
    surest = torch.stack([stacked[k, n] for n, k in enumerate(entropy_KN.argmin(dim=0).tolist())])
    voters = {f"teacher/t{k}": p for k, p in enumerate(said)}
    voters |= {"AvgPred": stacked.mean(dim=0), "HighestConf": surest, "student": student}
    return {name: p.argmax(dim=1) == images.labels_N for name, p in voters.items()}


@pytest.mark.parametrize("batch", [5, 64])
def test_accuracies_are_those_of_plain_arithmetic(tmp_path: Path, batch: int) -> None:
    one, images = built(tmp_path), image_set(38)
    found = evaluate(one, images, "test", batch=batch, parties=SplitSpec(mode="ibl", parties=2, ratio=4.0))
    right = plainly(one, images)
    expected = {f"test/{name}": 100.0 * float(r.double().mean()) for name, r in right.items()}
    for party, block in enumerate(([0, 1, 2], [3, 4])):
        members = torch.isin(images.labels_N, torch.tensor(block))
        expected |= {f"test/{n}/party{party}": 100.0 * float(r[members].double().mean()) for n, r in right.items()}
    assert found.samples == 38 and dict(found.items()) == pytest.approx(expected)
    assert list(found.teachers) == ["t0", "t1", "t2"] and set(found.frequent) == set(right)
    assert len(set(expected.values())) > 6  # the voters can be told apart


def test_the_student_is_only_read(tmp_path: Path) -> None:
    one = built(tmp_path)
    student = one.side.network.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    evaluate(one, image_set(9), "val", batch=4, parties=None)
    measure(one, per_generator=5, batch=4)
    assert student.training and all(m.training for m in student.modules())
    assert all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_student_alone(tmp_path: Path) -> None:
    one, images = built(tmp_path), image_set(20)
    alone = evaluate(one, images, "test", batch=8, parties=None, student_only=True)
    whole = evaluate(one, images, "test", batch=8, parties=None)
    assert dict(alone.items()) == {"test/student": whole.student} and alone.teachers == alone.ensembles == {}


def test_a_labelled_run_has_a_student_only(tmp_path: Path) -> None:
    one = labelled(write_npz(tmp_path / "set.npz"))
    assert isinstance(one.recipe.source, LabelledSpec)
    found = evaluate(one, one.recipe.source.dataset, "test", batch=4, parties=SplitSpec(parties=5))
    assert found.samples == 10 and found.teachers == {} and list(found.frequent) == ["student"]
    assert measure(one) == {}


def test_labels_follow_the_names_of_the_classes(tmp_path: Path) -> None:
    one, images = built(tmp_path), image_set(25)
    shuffled = [NAMES[c] for c in (2, 0, 3, 1, 4)]
    renamed = torch.tensor([shuffled.index(NAMES[label]) for label in images.labels_N.tolist()])
    other = MemoryImageSet(images.images_NCHW, renamed, shuffled)
    first, second = (evaluate(one, s, "test", batch=16, parties=None) for s in (images, other))
    assert first == second


@pytest.mark.parametrize(
    ("classes", "message"),
    [(NAMES[:4] + ["cat"], "evaluation.dataset.*cat.*missing.*class_4"), (NAMES + ["more"], "6 classes.*is 5")],
)
def test_foreign_classes_are_refused(tmp_path: Path, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(built(tmp_path, 1), image_set(5, classes), "test", batch=4, parties=None)


def test_ensembles_can_disagree() -> None:
    # Two teachers lean to class 1, a third is sure of class 0; the weights decide for AvgPred only.
    logits = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]])]
    assert [v.tolist() for v in votes(logits, [0.45, 0.45, 0.1])] == [[1], [1], [0], [1], [0]]
    assert [v.tolist() for v in votes(logits, [0.1, 0.1, 0.8])][3] == [0]
    assert votes([], []) == []


def test_the_best_teacher_is_chosen_on_validation_images() -> None:
    val = Evaluation("val", 9, 0.0, {"a": 50.0, "b": 60.0, "c": 60.0})
    test = Evaluation("test", 9, 0.0, {"a": 90.0, "b": 55.0, "c": 70.0})
    assert best_teacher(val, test) == BestTeacher("b", 60.0, 55.0)
    with pytest.raises(ValueError, match="student alone"):
        best_teacher(val, Evaluation("test", 9, 50.0))


def test_classes_without_images_have_no_accuracy(tmp_path: Path) -> None:
    images = MemoryImageSet(pictures(6), torch.zeros(6, dtype=torch.int64), NAMES)
    found = evaluate(built(tmp_path, 1), images, "test", batch=4, parties=SplitSpec(parties=5))
    assert found.frequent["student"][1:] == [None] * 4 and found.frequent["student"][0] == found.student


def test_quality_is_agreement_and_divergence_by_class(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz")
    dataset = {"kind": "npz", "path": str(tmp_path / "set.npz"), "size": 8, "channels": 3}
    one = built(tmp_path, 2, evaluation={"dataset": dataset})
    found = measure(one, per_generator=9, batch=4)
    assert set(found) == {SYNTHETIC, SUPPLIED} and found[SUPPLIED].overall.images == 10
    pixels = torch.cat([one.source.sample(kit, 9) for kit in one.source.kits])  # type: ignore[attr-defined]
    with torch.no_grad():
        ensemble = torch.stack([t(pixels).logits_NC.softmax(dim=1) for t in one.teachers]).mean(dim=0)
        student = one.side.network.eval()(pixels).logits_NC
    divergence = (ensemble * (ensemble.log() - student.log_softmax(dim=1))).sum(dim=1)
    same = (ensemble.argmax(dim=1) == student.argmax(dim=1)).double()
    overall = found[SYNTHETIC].overall
    assert overall.images == 18
    assert overall.kl == pytest.approx(float(divergence.mean()))
    assert overall.agreement == pytest.approx(100 * float(same.mean()))
    for c, part in enumerate(found[SYNTHETIC].by_class):
        members = ensemble.argmax(dim=1) == c
        assert part.images == int(members.sum())
        assert part.kl == (pytest.approx(float(divergence[members].mean())) if part.images else None)
    assert measure(one, per_generator=9, batch=4) == found


def test_a_student_equal_to_its_only_teacher_agrees_fully(tmp_path: Path) -> None:
    one = built(tmp_path, 1, student={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]})
    kit = one.source.kits[0]  # type: ignore[attr-defined]
    one.side.network.network.load_state_dict(kit.teacher.network.state_dict())
    one.teachers[0].network.fc.load_state_dict(kit.teacher.network.fc.state_dict())  # type: ignore[union-attr]
    overall = measure(one, per_generator=20)[SYNTHETIC].overall
    assert overall.agreement == 100.0 and overall.kl == pytest.approx(0.0, abs=1e-9)
