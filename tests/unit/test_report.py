"""The summary and its table, the cost of networks, and what a tracker writes and repairs."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_dist.config import Recipe, SplitSpec, parse
from dfkd_dist.engine import report, trackers
from dfkd_dist.engine.build import build
from dfkd_dist.engine.evaluate import Evaluation, evaluate
from dfkd_dist.engine.flops import card_cost, network_costs
from dfkd_dist.engine.quality import measure
from dfkd_dist.engine.trackers import METRICS, MetricsError, Tracker, read_metrics
from dfkd_dist.models.cards import Card
from tests.recipes import base, dafl, dfmf, dfq, merged, random_teachers, zskt
from tests.voters import image_set

CPU = torch.device("cpu")
KINDS = ("teacher", "generator", "assistant")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def trained() -> dict[str, Any]:
    rounds = {"warmup": 2, "main": 3, "student_steps": 2}
    one = build(parse(Recipe, dfmf(random_teachers(2), rounds=rounds)), CPU)
    one.trainer.fit()
    parties = SplitSpec(mode="ibl", parties=2, ratio=2.0)
    found = evaluate(one, image_set(20), "test", batch=8, parties=parties)
    val = evaluate(one, image_set(12), "val", batch=8, parties=None)
    return report.summarise(one, found, measure(one, per_generator=4), wall_seconds=83.0, validation=val)


# ------------------------------------------------------------------------------------------ summary


def test_a_summary_holds_what_tools_read(tmp_path: Path) -> None:
    summary = trained()
    path = report.write_summary(tmp_path, summary)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(summary))
    assert (read["method"], read["seed"], read["world_size"], read["wall_seconds"]) == ("test", 0, 1, 83.0)
    assert (read["rounds"], read["steps"]) == (5, 6)
    assert [teacher["name"] for teacher in read["teachers"]] == ["t0", "t1"]
    accuracies = [*read["teachers"], read["ensemble"], read["highest_confidence"], read["student"]]
    assert all(0 <= entry["accuracy"] <= 100 and len(entry["frequent"]) == 2 for entry in accuracies)
    assert set(read["throughput"]) == {"generator", "assistant", "student"}
    assert len(read["peak_memory_bytes"]) == 1 and read["peak_memory_bytes"][0] > 10**7
    assert read["best_teacher"]["name"] in ("t0", "t1")
    assert set(read["networks"]) == {"student"} | {f"{k}/{t}" for k in KINDS for t in ("t0", "t1")}
    assert read["quality"]["synthetic"]["overall"]["images"] == 8
    assert read["losses"]["generator"] == "0.1*bn + 0.2*ice + 0.3*bce + 1*adv"
    assert read["losses"]["generator (warm-up)"] == "1*bn + 1*ice + 1*bce"
    assert read["losses"]["student"] == "1*kl + 1*vid at temperature 3"


def test_without_evaluation_images_accuracies_are_null(tmp_path: Path) -> None:
    one = build(parse(Recipe, dfq(random_teachers(2))), CPU)
    summary = report.summarise(one, None, {}, wall_seconds=1.0, steps=0)
    read = json.loads(report.write_summary(tmp_path, summary).read_text())
    assert [teacher["accuracy"] for teacher in read["teachers"]] == [None, None]
    assert read["ensemble"]["accuracy"] is None and read["student"]["accuracy"] is None
    assert read["evaluation"] is None and read["best_teacher"] is None
    assert "student" in report.summary_table(read) and "%" not in report.summary_table(read)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = report.write_summary(tmp_path, {"a": [math.nan, {"b": math.inf}], "c": 1.5, "d": (1, "x")})
    assert json.loads(path.read_text()) == {"a": [None, {"b": None}], "c": 1.5, "d": [1, "x"]}


def test_a_failed_write_leaves_the_old_summary(tmp_path: Path) -> None:
    report.write_summary(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_summary(tmp_path, {"a": 2, "b": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_table_is_aligned() -> None:
    evaluation = Evaluation("test", 10, 9.5, {"a": 100.0, "longer_name": 81.234}, {"AvgPred": 99.0, "HighestConf": 7.0})
    summary = report.accuracies(["a", "longer_name"], evaluation)
    summary |= {"world_size": 4, "steps": 1200, "wall_seconds": 83.2, "quality": {}}
    summary["networks"] = {"teacher/a": {"parameters": 1234567, "flops": 1}}
    assert report.summary_table(summary).split("\n") == [
        "                                  network  parameters  accuracy",
        "teacher a                                   1,234,567  100.00 %",
        "teacher longer_name                                     81.23 %",
        "ensemble (mean of probabilities)                        99.00 %",
        "ensemble (most confident)                                7.00 %",
        "student                                                  9.50 %",
        "1,200 student steps in 1 min 23 s on 4 ranks",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (200.4, "3 min 20 s"), (7511, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


# ------------------------------------------------------------------------------------------- passes

COUNTED = [
    dfmf(random_teachers(2), rounds={"warmup": 2, "main": 3, "student_steps": 2}),
    dfmf(random_teachers(3), rounds={"warmup": 0, "main": 2}, source={"assistant": {"steps": 3}}),
    dfq(random_teachers(2), rounds={"warmup": 1, "main": 3}),
    zskt(random_teachers(2)),
    dafl(random_teachers(2)),
    merged(dfq(random_teachers(2)), {"source": {"student_first": True}, "rounds": {"warmup": 1, "main": 2}}),
]


@pytest.mark.parametrize("tree", COUNTED, ids=["dfmf", "dfmf_3", "dfq", "zskt", "dafl", "student_first"])
def test_image_passes_are_those_that_happen(tree: dict[str, Any]) -> None:
    one = build(parse(Recipe, tree), CPU)
    seen = dict.fromkeys(report.image_passes(one.recipe, one.source.update_steps, 0, 0), 0)

    def count(kind: str) -> Any:
        return lambda _, args: seen.__setitem__(kind, seen[kind] + len(args[0]))

    one.side.network.register_forward_pre_hook(count("student"))
    for kit in one.source.kits:  # type: ignore[attr-defined]
        for kind, module in {"teacher": kit.teacher, "generator": kit.generator.module}.items():
            module.register_forward_pre_hook(count(kind))
        kit.answering.register_forward_pre_hook(count("teacher"))
        if kit.assistant is not None:
            kit.side.network.register_forward_pre_hook(count("assistant"))
    one.trainer.fit()
    assert seen == report.image_passes(
        one.recipe, one.source.update_steps, one.trainer.position.round, one.trainer.student.steps
    )


def test_passes_of_a_labelled_run() -> None:
    tree = base([], objective={"kl": 0.0, "ce": 1.0}, rounds={"warmup": 0, "main": 7})
    tree["source"] = {"kind": "labelled", "dataset": {"kind": "digits", "size": 8, "channels": 3}}
    assert report.image_passes(parse(Recipe, tree), lambda round: 0, 7, 7) == {"student": 77}


# --------------------------------------------------------------------------------------------- cost


def test_a_multiply_add_counts_as_two_operations() -> None:
    card = Card("tiny", 10, 16, 1, [0.5], [0.25])
    convolutions = 9 * (16 * 16 * 1 * 24 + 8 * 8 * 24 * 48 + 4 * 4 * 48 * 96)
    cost = card_cost(card)
    assert cost.flops == 2 * (convolutions + 96 * 10)
    assert cost.parameters == 9 * (24 + 24 * 48 + 48 * 96) + 2 * (24 + 48 + 96) + 96 * 10 + 10


def test_every_network_has_a_cost() -> None:
    one = build(parse(Recipe, dfmf(random_teachers(2), student={"size": 16})), CPU)
    costs = network_costs(one)
    assert costs["student"] == card_cost(one.student_card) == card_cost(replace(one.cards[0], size=16))
    assert costs["teacher/t0"] == card_cost(one.cards[0]) == costs["assistant/t0"]
    assert costs["generator/t0"] == costs["generator/t1"] and costs["generator/t0"].flops > 0
    assert list(costs)[:3] == ["teacher/t0", "teacher/t1", "student"] and len(costs) == 7


# ------------------------------------------------------------------------------------------ tracker


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / METRICS))


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, first=True, total_rounds=4, stream=io.StringIO())
    tracker.log(2, 0.5, {"student/kl": 1.25, "bad": math.nan})
    tracker.log(4, 1.0, {"student/kl": 1.0})
    tracker.close()
    expected = [
        {"round": 2, "time": 0.5, "student/kl": 1.25, "bad": None},
        {"round": 4, "time": 1.0, "student/kl": 1.0},
    ]
    assert lines_of(tmp_path) == expected
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == expected


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    tracker = Tracker(tmp_path / "absent", first=False, total_rounds=4, tensorboard=True, stream=stream)
    tracker.truncate(0)
    tracker.log(1, 0.0, {"a": 1.0})
    tracker.progress(2)
    tracker.close()
    assert stream.getvalue() == "" and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("tail", ["", '{"round": 4, "ti', '{"round": 4}'])
def test_truncate_drops_later_rounds_and_a_cut_line(tmp_path: Path, tail: str) -> None:
    tracker = Tracker(tmp_path, first=True, total_rounds=9, stream=io.StringIO())
    for round in (1, 2, 3):
        tracker.log(round, float(round), {"a": 0.5})
    with open(tmp_path / METRICS, "a") as file:
        file.write(tail)
    resumed = Tracker(tmp_path, first=True, total_rounds=9, stream=io.StringIO())
    resumed.truncate(2)
    resumed.log(3, 7.0, {"a": 0.25})
    assert [(line["round"], line["time"]) for line in lines_of(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


@pytest.mark.parametrize("bad", ["{", "[]", "{}", '{"round": "2"}'])
def test_another_damaged_line_is_an_error(tmp_path: Path, bad: str) -> None:
    (tmp_path / METRICS).write_text(f'{{"round": 1}}\n{bad}\n{{"round": 3}}\n')
    with pytest.raises(MetricsError, match="metrics.jsonl, line 2"):
        Tracker(tmp_path, first=True, total_rounds=9).truncate(3)


def test_progress_is_quiet_when_not_on_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    tracker = Tracker(tmp_path, first=True, total_rounds=1000, stream=stream)
    for round in range(1, 1001):
        tracker.progress(round, 123.4)
    tracker.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11 and "\r" not in stream.getvalue()
    assert lines[0].startswith("round 1/1000") and lines[-1].startswith("round 1000/1000  123 images/s  0:00:00 left")


def test_progress_is_redrawn_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    tracker = Tracker(tmp_path, first=True, total_rounds=3, stream=stream)
    tracker.log(1, 0.1, {"generator/a/bn": 0.1, "student/kl": 0.123456, "assistant/a/kl": 2.0})
    tracker.progress(2, 1e6)
    tracker.progress(3, 1e6)
    tracker.close()
    drawn = stream.getvalue().split("\r")[1:]
    assert len(drawn) == 3 and all(len(line.rstrip("\n")) == 59 for line in drawn)
    assert drawn[0].startswith("round 1/3  student/kl 0.1235  assistant/a/kl 2  ") and drawn[2].endswith("\n")
    assert "1,000,000 images/s" in drawn[1]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, first=True, total_rounds=9, tensorboard=True, stream=io.StringIO())
    tracker.log(1, 0.1, {"student/kl": 2.0})
    tracker.log(2, 0.2, {"student/kl": 9.0})
    tracker.close()
    resumed = Tracker(tmp_path, first=True, total_rounds=9, tensorboard=True, stream=io.StringIO())
    resumed.truncate(1)
    resumed.log(2, 0.2, {"student/kl": 1.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / trackers.BOARD))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("student/kl")] == [(1, 2.0), (2, 1.0)]


def test_missing_tensorboard_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[tensorboard\]'"):
        Tracker(tmp_path, first=True, total_rounds=1, tensorboard=True)
