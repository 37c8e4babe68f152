"""Selections on real ranks: the same bits as one process, however teachers are laid out, and nobody left waiting."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.engine.select import select as select_command
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.mesh import world_group
from dfkd_dist.parallel.stopping import EXIT_STOPPED
from dfkd_dist.parallel.topn import top_n, top_n_balanced
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources import answers_cache
from dfkd_dist.sources.selection_scored import TopSelector
from tests.distributed.harness import run_ranks
from tests.distributed.running import anew
from tests.recipes import CLASSES, write_teachers
from tests.selecting import Selecting, Tree, recipe, select, student
from tests.shards import encoded, small_pictures, write_shards

N = 43
BROKEN = (5, 19, 20)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tree]]:
    folder = tmp_path_factory.mktemp("ranks")
    files: list[Any] = [encoded(image, "png") for image in small_pictures(N)]
    for i in BROKEN:
        files[i] = files[i][: len(files[i]) // 2]
    sections = [section | {"weight": 1.0 + k} for k, section in enumerate(write_teachers(folder, 3))]
    return write_shards(folder / "set", files, suffix="png"), sections


# ------------------------------------------------------------------------------------------------ top N


def numbers(kind: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    generator = np.random.Generator(np.random.Philox(key=3))
    n = 5000
    scores_n = generator.normal(size=n).astype(np.float32)
    if kind == "tied":
        scores_n = generator.choice(np.array([0.0, -0.0, 1.0, -np.inf, np.inf], np.float32), n)
    return scores_n, generator.permutation(n).astype(np.int64), generator.integers(0, 7, n)


TOPS = [(kind, count) for kind in ("normal", "tied") for count in (1, 1234)]


def _top(rank: int, size: int) -> list[tuple[list[int], list[int]]]:
    found = []
    for kind, count in TOPS:
        scores_n, ids_n, labels_n = numbers(kind)
        own, group = slice(*bounds(len(ids_n), size, rank)), world_group(rank, size)
        plain = top_n(scores_n[own], ids_n[own], count, group, largest=True)
        even = top_n_balanced(scores_n[own], ids_n[own], labels_n[own], count, 7, group, largest=True)
        found.append((ids_n[own][plain].tolist(), ids_n[own][even].tolist()))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_top_n_is_a_full_sort_on_real_ranks(size: int) -> None:
    told = run_ranks(_top, size)
    for case, (kind, count) in enumerate(TOPS):
        scores_n, ids_n, labels_n = numbers(kind)
        order = np.lexsort((ids_n, -(scores_n + np.float32(0.0))))
        plain = sorted(i for part in told for i in part[case][0])
        assert plain == sorted(ids_n[order][:count].tolist())
        even = np.array(sorted(i for part in told for i in part[case][1]))
        per_class = np.bincount(labels_n[np.argsort(ids_n)][even], minlength=7)
        assert per_class.sum() == count and per_class.max() - per_class.min() <= 1


def _refuses(rank: int, size: int) -> str:
    scores_n = np.array([1.0, np.nan if rank == 1 else 0.0], np.float32)
    with pytest.raises(ValueError) as caught:
        top_n(scores_n, np.array([2 * rank, 2 * rank + 1]), 1, world_group(rank, size), largest=True)
    return str(caught.value)


def test_a_nan_on_one_rank_is_refused_on_all() -> None:
    assert set(run_ranks(_refuses, 3)) == {"top_n: 1 scores are NaN, which have no place in an order"}


# -------------------------------------------------------------------------------------------- selectors

SELECTIONS: dict[str, Tree] = {
    "top": {"kind": "top", "count": 17, "score": "entropy"},
    "balanced": {"kind": "top", "count": 12, "balanced": True},
    "random": {"kind": "random", "count": 9},
    "kd3": {"kind": "kd3", "threshold": 0.6},
    "kd3 at random": {"kind": "kd3", "threshold": 0.6, "mode": "random"},
}


def _selected(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path, count: int, rows: int | None) -> Any:
    """Digests of every choice and of this rank's scores by id; and that the set is shared out."""
    torch.manual_seed(rank)  # nothing may depend on it
    masks, scores = {}, {}
    for name, options in SELECTIONS.items():
        case = Selecting(recipe(given[0], given[1][:count], options), folder / name, size, rows)
        selector: Any = case.selector()
        for round in range(2):
            mask_N = select(selector, round, student(round))
            assert not mask_N[list(BROKEN)].any() or name == "random"
            masks[name, round] = np.flatnonzero(mask_N).tolist()
        if name == "top":
            scores = dict(zip(selector.share.own_ids().tolist(), selector.scores_n.tolist(), strict=True))
    return masks, scores


@cache
def alone(given_key: str, count: int, folder: Path) -> Any:
    shards, sections = _cases[given_key]
    return run_ranks(_selected, 1, (shards, sections), folder, count, None)[0]


_cases: dict[str, tuple[Path, list[Tree]]] = {}


@pytest.mark.parametrize(
    ("size", "count", "rows"),
    [(2, 1, None), (3, 1, None), (2, 2, None), (4, 2, None), (3, 3, None), (4, 3, None), (4, 3, 1)],
)
def test_the_same_bits_on_any_ranks(
    given: tuple[Path, list[Tree]], tmp_path: Path, size: int, count: int, rows: int | None
) -> None:
    key = str(given[0])
    _cases[key] = given
    masks, scores = alone(key, count, given[0].parent / f"alone{count}")
    told = run_ranks(_selected, size, given, tmp_path, count, rows, timeout=120)
    assert all(rank_masks == masks for rank_masks, _ in told)
    joined = {i: score for _, part in told for i, score in part.items()}
    assert joined == scores and sum(len(part) for _, part in told) == N


def _uncounted(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path) -> list[int]:
    """KD3 with thresholds from each rank's own counts."""
    original = Group.sum_
    Group.sum_ = lambda self, t: t if t.shape == (CLASSES,) else original(self, t)  # type: ignore[method-assign]
    case = Selecting(recipe(given[0], given[1][:1], SELECTIONS["kd3"]), folder, size)
    return np.flatnonzero(select(case.selector(), 0, student(0))).tolist()


def test_counts_of_one_rank_would_not_do(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    _cases[str(given[0])] = given
    masks, _ = alone(str(given[0]), 1, given[0].parent / "alone1")
    assert run_ranks(_uncounted, 3, given, tmp_path)[0] != masks["kd3", 0]


def _from_kept(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path) -> tuple[list[int], int]:
    case = Selecting(recipe(given[0], given[1][:2], SELECTIONS["top"]), folder, size)
    chosen = np.flatnonzero(select(case.selector(), 0)).tolist()
    return chosen, case.images_asked()


def test_answers_kept_by_one_layout_serve_another(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    first = run_ranks(_from_kept, 3, given, tmp_path)
    later = run_ranks(_from_kept, 2, given, tmp_path)
    assert first[0][0] == later[0][0] == later[1][0]
    # Each of two rows answers for both blocks of the two steps in which a broken file is looked at again.
    assert sum(asked for _, asked in later) <= 2 * 2 * 2 * 4


def _fails(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path, what: str) -> str:
    case = Selecting(recipe(given[0], given[1][:2], SELECTIONS["top"]), folder, size)
    selector: Any = case.selector()
    scoring = selector.scoring

    def fail(*args: Any) -> Any:
        raise DatasetError("the disk is on fire")

    if rank == 1 and what == "read":
        scoring._read = fail
    selector.score(0, 0, None) if what == "keep" else None
    if rank == 1 and what == "keep":
        scoring.kept.write = fail
    if rank == 1 and what == "folder":
        answers_cache.AnswerCache = fail  # type: ignore[assignment,misc]
    with pytest.raises(DatasetError) as caught:
        select(selector, 0)
    return str(caught.value)


@pytest.mark.parametrize("what", ["read", "keep", "folder"])
def test_a_failure_on_one_rank_is_raised_on_all(given: tuple[Path, list[Tree]], tmp_path: Path, what: str) -> None:
    told = run_ranks(_fails, 2, given, tmp_path, what)
    assert told == ["rank 1: the disk is on fire", "the disk is on fire"]


# ---------------------------------------------------------------------------------------- dfkd select


def _command(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path, options: Tree) -> Any:
    facts = anew()
    spec = recipe(given[0], given[1][:2], options)
    code, tally = select_command(spec, folder / "chosen.jsonl", facts, into=folder / "small", device="cpu")
    assert tally is not None
    return code, tally.chosen, tally.scored, tally.unreadable, tally.classes, tally.lowest, tally.highest


@pytest.mark.parametrize("kind", ["top", "random"])
def test_the_command_writes_the_same_file(given: tuple[Path, list[Tree]], tmp_path: Path, kind: str) -> None:
    written = set()
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        told = run_ranks(_command, size, given, folder, SELECTIONS[kind], timeout=120)
        assert all(said == told[0] for said in told)
        code, chosen, scored, unreadable, *_ = told[0]
        assert (code, chosen) == (0, SELECTIONS[kind]["count"])
        assert kind == "random" or (scored, sum(unreadable.values())) == (N - 3, 3)
        small = read_manifest(folder / "small")
        assert len(small) == chosen and (small.classes is not None) == (kind == "top")
        written.add(hashlib.sha256((folder / "chosen.jsonl").read_bytes()).hexdigest() + small.digest)
    assert len(written) == 1


def _cannot_write(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path) -> str:
    spec = recipe(given[0], given[1][:2], {**SELECTIONS["top"], "cache": str(folder / "answers")})
    with pytest.raises(ValueError) as caught:
        select_command(spec, folder / "no" / "file", anew(), device="cpu")
    return str(caught.value)


def test_a_file_that_cannot_be_written_is_told_by_all(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    (tmp_path / "no").write_text("a file where a folder should be")
    assert all("cannot be written" in said for said in run_ranks(_cannot_write, 2, given, tmp_path))


def _stopped(rank: int, size: int, given: tuple[Path, list[Tree]], folder: Path) -> list[int]:
    original, codes = TopSelector.score, []

    def score(self: Any, round: int, step: int, network: Any) -> None:
        original(self, round, step, network)
        if step == 2 and rank == size - 1 and not codes:
            os.kill(os.getpid(), 15)

    TopSelector.score = score  # type: ignore[method-assign]
    for attempt in (1, 2):
        spec = recipe(given[0], given[1][:2], SELECTIONS["top"])
        codes.append(select_command(spec, folder / "chosen.jsonl", anew(attempt), device="cpu")[0])
    return codes


def test_a_signal_stops_all_and_the_same_command_goes_on(given: tuple[Path, list[Tree]], tmp_path: Path) -> None:
    assert run_ranks(_stopped, 2, given, tmp_path) == [[EXIT_STOPPED, 0]] * 2
    assert (tmp_path / "chosen.jsonl").exists()
