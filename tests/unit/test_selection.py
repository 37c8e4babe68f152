"""Selectors of one process against a full sort of scores that are computed aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dfkd_dist.cli import main
from dfkd_dist.config import dump
from dfkd_dist.data.answers import ANSWERS
from dfkd_dist.data.datasets import to_image_space
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.selection import Chosen, SelectionWriter, read_selection
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.stream.order import subset
from dfkd_dist.data.stream.stream import chunks_of, scan
from dfkd_dist.engine.select import Tally
from dfkd_dist.losses import kd3_selection as kd3
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.batchnorm import reading_only
from tests.recipes import CLASSES, write_teachers
from tests.selecting import ROUNDS, Selecting, Tree, recipe, select, student
from tests.shards import PER_SHARD, encoded, small_pictures, write_shards

N = sum(PER_SHARD)
BROKEN = (5, 19, 20)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tree]]:
    """A set with three files that are no images, and two teachers."""
    folder = tmp_path_factory.mktemp("selection")
    files: list[Any] = [encoded(image, "png") for image in small_pictures(N)]
    for i in BROKEN:
        files[i] = files[i][: len(files[i]) // 2]
    sections = [section | {"weight": 1.0 + k} for k, section in enumerate(write_teachers(folder, 2))]
    return write_shards(folder / "set", files, suffix="png"), sections


def selecting(given: tuple[Path, list[Tree]], folder: Path, **selection: Any) -> Selecting:
    reader = selection.pop("reader", None)
    teachers = given[1][: selection.pop("teachers", 2)]
    return Selecting(recipe(given[0], teachers, selection, reader), folder)


def logits(case: Selecting, network: ImageNetwork | None = None, fraction: float = 1.0) -> tuple[list[Any], Any]:
    """fp32 logits `[N, C]` of each teacher (and of a student), and which samples can be read."""
    source: Any = case.recipe.source
    inside_N = subset(N, fraction, case.recipe.seed)
    valid_N = np.zeros(N, bool)
    networks = [*case.teachers] if network is None else [*case.teachers, network]
    out = [torch.zeros(N, CLASSES) for _ in networks]
    for raw in scan(case.manifest, source.reader, batch=4, size=8, channels=3, chunks=chunks_of(case.manifest, 4)):
        keep = inside_N[raw.ids_N.numpy()]
        ids_n = raw.ids_N[keep]
        valid_N[ids_n] = raw.valid_N[keep].numpy()
        for row, one in zip(out, networks, strict=True):
            if len(ids_n):
                row[ids_n] = one(to_image_space(raw.images_NCHW[keep]), frozenset({LOGITS})).logits_NC.detach()
    return out, valid_N


def probabilities(rows: list[Any], weights: list[float]) -> NDArray[np.float64]:
    return sum(w * torch.softmax(z.double(), dim=1) for w, z in zip(weights, rows, strict=True)).numpy()  # type: ignore


WEIGHTS = [1 / 3, 2 / 3]


@pytest.mark.parametrize("score", ["confidence", "entropy"])
@pytest.mark.parametrize("order", ["highest", "lowest"])
@pytest.mark.parametrize("count", [1, 17, 40])
def test_top_is_a_full_sort(given: tuple[Path, list[Tree]], tmp_path: Path, score: str, order: str, count: int) -> None:
    case = selecting(given, tmp_path, kind="top", score=score, order=order, count=count)
    rows, valid_N = logits(case)
    assert np.flatnonzero(~valid_N).tolist() == list(BROKEN)
    p_NC = probabilities(rows, WEIGHTS)
    of_N = p_NC.max(axis=1) if score == "confidence" else -(p_NC * np.log(p_NC)).sum(axis=1)
    of_N = -of_N if order == "highest" else of_N
    best = [i for i in np.argsort(of_N, kind="stable") if valid_N[i]][:count]
    selector = case.selector()
    chosen_N = select(selector, 0)
    assert np.flatnonzero(chosen_N).tolist() == sorted(best)
    assert selector.steps(0) == len(chunks_of(case.manifest, 4)) and selector.steps(1) == 0
    assert selector.chosen(3) is chosen_N
    assert dict(case.quarantine.counts) and sum(case.quarantine.counts.values()) == 3


def test_balanced_takes_evenly(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    case = selecting(given, tmp_path, kind="top", count=14, balanced=True)
    rows, valid_N = logits(case)
    labels_N = probabilities(rows, WEIGHTS).argmax(axis=1)
    chosen_N = select(case.selector(), 0)
    counts_C, there_C = (np.bincount(labels_N[m], minlength=CLASSES) for m in (chosen_N & valid_N, valid_N))
    assert counts_C.sum() == chosen_N.sum() == 14
    short = counts_C < there_C
    assert counts_C[short].max() - counts_C[short].min() <= 1 and (counts_C[~short] <= counts_C[short].max()).all()


def test_fewer_readable_than_asked(
    given: tuple[Path, list[Tree]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = selecting(given, tmp_path, kind="top", count=N)
    assert np.flatnonzero(~select(case.selector(), 0)).tolist() == list(BROKEN)
    assert "only 40 samples can be read" in caplog.text
    with pytest.raises(DatasetError, match=f"count is {N + 1}, but .* offers {N} samples"):
        selecting(given, tmp_path, kind="top", count=N + 1).selector()


def test_fraction_is_not_looked_at(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    case = selecting(given, tmp_path, kind="top", count=9, reader={"fraction": 0.5}, teachers=1)
    inside_N = subset(N, 0.5, case.recipe.seed)
    rows, valid_N = logits(case, fraction=0.5)
    p_N = probabilities(rows, [1.0]).max(axis=1)
    best = [i for i in np.argsort(-p_N, kind="stable") if valid_N[i] and inside_N[i]][:9]
    for _ in range(2):  # the second time from what was kept
        assert np.flatnonzero(select(case.selector(), 0)).tolist() == sorted(best)
    with pytest.raises(DatasetError, match=r"offers \d+ samples \(source.reader.fraction is 0.5\)"):
        selecting(given, tmp_path, kind="top", count=40, reader={"fraction": 0.5}).selector()
    with pytest.raises(DatasetError, match="leaves none"):
        selecting(given, tmp_path, kind="top", count=1, reader={"fraction": 1e-9}).selector()


def test_teachers_are_asked_once(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    first = selecting(given, tmp_path, kind="top", count=10)
    chosen_N = select(first.selector(), 0)
    steps = len(chunks_of(first.manifest, 4))
    assert first.images_asked() == 2 * 4 * steps  # two teachers, blocks of one length
    again = selecting(given, tmp_path, kind="top", count=10, score="entropy", order="lowest")
    select(again.selector(), 0)
    # Chunks with a file that cannot be read are looked at again: samples 5 and 19, 20 lie in two.
    assert again.images_asked() == 2 * 4 * 2
    for file in (tmp_path / "cache").rglob(ANSWERS):
        data = bytearray(file.read_bytes())
        data[4 * CLASSES * 30] ^= 1  # one bit of sample 30
        file.write_bytes(data)
    torn = selecting(given, tmp_path, kind="top", count=10)
    assert (select(torn.selector(), 0) == chosen_N).all()
    assert torn.images_asked() == 2 * 4 * 3
    other = selecting(given, tmp_path, kind="top", count=10, teachers=1)
    other.teachers[0].network.get_parameter(  # type: ignore[union-attr]
        [name for name, _ in other.teachers[0].network.named_parameters()][-1]
    ).data.add_(1.0)
    select(other.selector(), 0)
    assert other.images_asked() == 4 * steps


def test_another_run_may_be_ahead(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    slow = selecting(given, tmp_path, kind="top", count=10)
    selector: Any = slow.selector()
    for step in range(3):
        selector.score(0, step, None)
    quick: Any = selecting(given, tmp_path, kind="top", count=10).selector()
    for step in range(7):
        quick.score(0, step, None)
    for step in range(3, selector.steps(0)):
        selector.score(0, step, None)
    alone_N = select(selecting(given, tmp_path / "alone", kind="top", count=10).selector(), 0)
    assert (selector.chosen(0) == alone_N).all()
    steps = len(chunks_of(slow.manifest, 4))
    assert slow.images_asked() == 2 * 4 * (steps - 3)  # 4 steps less, but one of them has a broken file


def test_random_is_nested(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    masks = [selecting(given, tmp_path, kind="random", count=n).selector().chosen(0) for n in (5, 20, 43)]
    assert [int(m.sum()) for m in masks] == [5, 20, 43]
    assert (masks[0] <= masks[1]).all()
    half = selecting(given, tmp_path, kind="random", count=12, reader={"fraction": 0.5}).selector().chosen(0)
    assert half.sum() == 12 and (half <= subset(N, 0.5, 0)).all()
    with pytest.raises(DatasetError, match="count is 44"):
        selecting(given, tmp_path, kind="random", count=44).selector()


def test_manifest_is_followed(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    path = tmp_path / "chosen.jsonl"
    case = selecting(given, tmp_path, kind="manifest", path=str(path))
    with SelectionWriter(path, case.manifest, 2, {}, []) as writer:
        writer.add(1, case.manifest.keys(1), Chosen(np.array([0, 3])))
    selector = case.selector()
    assert np.flatnonzero(selector.chosen(0)).tolist() == [7, 10]
    assert selector.steps(0) == 0 and selector.state_dict() == {}
    with pytest.raises(DatasetError, match="no such file"):
        selecting(given, tmp_path, kind="manifest", path=str(tmp_path / "none")).selector()


# ------------------------------------------------------------------------------------------------- KD3


def naive_kd3(case: Selecting, network: ImageNetwork, round: int, counts: str, threshold: float, mode: str) -> Any:
    """Eqs. 2-8 with loops, in float64."""
    with torch.no_grad(), reading_only(network, "eval"):
        (*teachers, learner), valid_N = logits(case, network)
    share = {"teacher": 0.0, "student": 1.0}.get(mode, kd3.alpha(round, ROUNDS))
    p_NC = (1 - share) * probabilities(teachers, WEIGHTS) + share * probabilities([learner], [1.0])
    n_C = [0] * CLASSES
    for i in range(N):
        if valid_N[i] and (counts == "all" or p_NC[i].max() > threshold):
            n_C[int(p_NC[i].argmax())] += 1
    limit_C = [threshold * n / max(max(n_C), 1) for n in n_C]
    return [i for i in range(N) if valid_N[i] and p_NC[i].max() > limit_C[int(p_NC[i].argmax())]]


@pytest.mark.parametrize("counts", ["all", "confident"])
@pytest.mark.parametrize("mode", ["dynamic", "teacher", "student"])
def test_kd3_every_round(given: tuple[Path, list[Tree]], tmp_path: Path, counts: str, mode: str) -> None:
    case = selecting(given, tmp_path, kind="kd3", counts=counts, mode=mode, threshold=0.6)
    selector = case.selector()
    found = []
    for round in range(ROUNDS):
        network = student(round)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        chosen_N = select(selector, round, network)
        wanted = naive_kd3(case, network, round, counts, 0.6, mode)
        assert np.flatnonzero(chosen_N).tolist() == wanted
        assert network.training and all(p.requires_grad for p in network.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        found.append(tuple(wanted))
    assert mode == "teacher" or len(set(found)) > 1
    assert all(0 < len(one) < N - 3 for one in found)


def test_kd3_at_random_takes_as_many(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    dynamic = selecting(given, tmp_path, kind="kd3", threshold=0.6).selector()
    at_random = selecting(given, tmp_path, kind="kd3", threshold=0.6, mode="random").selector()
    seen = []
    for round in (0, 1):
        wanted_N, found_N = select(dynamic, round, student()), select(at_random, round, student())
        assert found_N.sum() == wanted_N.sum() and (found_N != wanted_N).any()
        assert not found_N[list(BROKEN)].any()
        seen.append(found_N)
    assert (seen[0] != seen[1]).any()


def test_kd3_asks_whom_it_must(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    case = selecting(given, tmp_path, kind="kd3", mode="teacher")
    selector = case.selector()
    select(selector, 0, student())
    asked, read = case.images_asked(), case.quarantine.asked
    select(selector, 1, student())
    assert case.images_asked() == asked + 2 * 4 * 2  # the chunks with bad files
    assert case.quarantine.asked == read + 7  # and nothing else was even decoded


# ----------------------------------------------------------------------------------------------- resume


def test_a_choice_survives(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    selector = selecting(given, tmp_path, kind="kd3", threshold=0.6).selector()
    assert selector.state_dict() == {}
    chosen_N = select(selector, 1, student())
    state = selector.state_dict()
    assert state["bits"].dtype == torch.uint8 and len(state["bits"]) == -(-N // 8)
    other = selecting(given, tmp_path, kind="kd3", threshold=0.6).selector()
    with pytest.raises(RuntimeError, match="before it was made"):
        other.chosen(1)
    other.load_state_dict(state)
    assert (other.chosen(1) == chosen_N).all()
    with pytest.raises(RuntimeError, match="round 2"):
        other.chosen(2)
    with pytest.raises(DatasetError, match="among 12 samples"):
        other.load_state_dict({**state, "samples": 12})
    top = selecting(given, tmp_path, kind="top", count=3).selector()
    top.load_state_dict({"round": 0, "samples": N, "bits": state["bits"]})
    assert (top.chosen(2) == chosen_N).all() and top.steps(2) == 0


@pytest.mark.parametrize("kind", ["kd3", "top"])
def test_scoring_goes_on_after_a_restart(given: tuple[Path, list[Tree]], tmp_path: Path, kind: str) -> None:
    options = {"kind": kind, "threshold": 0.6} if kind == "kd3" else {"kind": kind, "count": 9}
    whole_N = select(selecting(given, tmp_path / "a", **options).selector(), 0, student())
    first = selecting(given, tmp_path / "b", **options).selector()
    for step in range(5):
        first.score(0, step, student())
    later = selecting(given, tmp_path / "b", **options)
    selector = later.selector()
    selector.load_state_dict(first.state_dict())
    for step in range(5, selector.steps(0)):
        selector.score(0, step, student())
    assert (selector.chosen(0) == whole_N).all()
    # Round 1 of a run that stopped within it: round 0's choice is in the state, round 1 is redone.
    if kind == "kd3":
        want_N = select(selector, 1, student(9))
        again = later.selector()
        again.load_state_dict(first.state_dict())
        again.score(1, again.steps(1) - 1, student(9))
        assert (again.chosen(1) == want_N).all()


def test_logits_that_are_not_finite_are_named(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    case = selecting(given, tmp_path, kind="top", count=3)
    with torch.no_grad():
        for parameter in case.teachers[1].parameters():
            parameter.mul_(1e30)
    selector = case.selector()
    with pytest.raises(ValueError, match=r"teacher 1 .* gives 000000.tar, index \d logits that are not finite"):
        select(selector, 0)


def test_too_many_bad_files_stop(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    files = [b"no image" for _ in range(130)]
    shards = write_shards(tmp_path / "bad", files, per_shard=60)
    case = Selecting(
        recipe(shards, given[1][:1], {"kind": "top", "count": 3, "batch": 50}, {"bad_limit": 0.1}), tmp_path
    )
    with pytest.raises(DatasetError, match="could not be used"):
        select(case.selector(), 0)


# -------------------------------------------------------------------------------------------- dfkd select


def _recipe_file(given: tuple[Path, list[Tree]], folder: Path, selection: Tree | None) -> str:
    path = folder / "recipe.yaml"
    path.write_text(dump(recipe(given[0], given[1], selection)))
    return str(path)


def test_the_command_tells_and_writes(
    given: tuple[Path, list[Tree]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = _recipe_file(given, tmp_path, {"kind": "top", "count": 10}), tmp_path / "chosen.jsonl"
    select_line = ["select", file, "--out", str(out), "--device", "cpu"]
    assert main([*select_line, "--compact", str(tmp_path / "small"), "source.selection.count=12"]) == 0
    table = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    said = {key.strip(): value for key, value in table.items()}
    assert (said["samples"], said["scored"], said["chosen"]) == (str(N), str(N - 3), "12")
    assert sum(int(value) for key, value in said.items() if key.startswith("unreadable: ")) == 3
    assert sum(int(value) for key, value in said.items() if key.startswith("class ")) == 12
    assert len(read_manifest(tmp_path / "small")) == 12

    spec = recipe(given[0], given[1][:2], {"kind": "top", "count": 12})
    case = Selecting(spec, tmp_path / "run", loud=False)
    chosen_N = select(case.selector(), 0)
    found = read_selection(out, case.manifest, labels=True)
    assert (found.chosen_N == chosen_N).all()
    (first, second), _ = logits(case)
    p_NC = probabilities([first, second], WEIGHTS)
    assert found.labels_N is not None
    assert found.labels_N[chosen_N].tolist() == p_NC.argmax(axis=1)[chosen_N].tolist()
    surer_N = torch.stack([z.double().softmax(dim=1).max(dim=1).values for z in (first, second)]).argmax(dim=0)
    for line, i in zip(out.read_text().splitlines()[1:], np.flatnonzero(chosen_N), strict=True):
        row = json.loads(line)
        assert row["score"] == pytest.approx(-np.log(p_NC[i].max()), rel=1e-6)
        assert row["teacher"] == f"t{surer_N[i]}"

    assert main(select_line) == 2 and "exists; give --overwrite" in capsys.readouterr().err
    assert main([*select_line, "--overwrite"]) == 0
    assert read_selection(out, case.manifest).chosen_N.sum() == 10
    follow = selecting(given, tmp_path, kind="manifest", path=str(out)).selector()
    assert follow.chosen(0).sum() == 10


@pytest.mark.parametrize(
    ("selection", "why"),
    [
        (None, "source.selection.kind is None; allowed for dfkd select: top, random"),
        ({"kind": "kd3"}, "kd3 chooses anew in every round"),
        ({"kind": "manifest", "path": "x"}, "source.selection.kind is 'manifest'"),
        ({"kind": "top", "count": 99}, "count is 99, but"),
        ({"kind": "random", "count": 99}, "count is 99, but"),
    ],
)
def test_what_cannot_be_selected_is_refused(
    given: tuple[Path, list[Tree]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    selection: Tree | None,
    why: str,
) -> None:
    file = _recipe_file(given, tmp_path, selection)
    assert main(["select", file, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "debug/dfmf.yaml", "--out", str(tmp_path / "out")]) == 2
    assert "source.kind is 'generative' and reads no shards" in capsys.readouterr().err


def test_a_table_of_many_classes_is_short() -> None:
    many = Tally(5000, 4990, {"corrupt": 10}, 3000, {str(c): c for c in range(100)}, 0.1, 0.5, 2.0).table()
    assert len(many.splitlines()) == 4 + 1 + 20 + 3
    assert "1 of 100" in many and "2,495" in many and "class 99" in many and "class 50" not in many


@pytest.mark.slow
def test_reading_processes_change_nothing(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    alone_N = select(selecting(given, tmp_path / "a", kind="top", count=9).selector(), 0)
    helped = selecting(given, tmp_path / "b", kind="top", count=9, reader={"workers": 1}).selector()
    assert (select(helped, 0) == alone_N).all()
