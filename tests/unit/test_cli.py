"""The commands as a person types them, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dfkd_dist
from dfkd_dist.cli import main
from dfkd_dist.config import load_recipe, load_teachers_recipe, read_yaml
from dfkd_dist.engine.entry import EXIT_REFUSED
from dfkd_dist.engine.finished import open_finished
from dfkd_dist.resources import configs_dir

Capture = pytest.CaptureFixture[str]
CONFIGS = configs_dir()
DEBUG = sorted(p.stem for p in (CONFIGS / "debug").glob("*.yaml") if "archs" not in read_yaml(p))
SHORT = {
    "labelled": ["rounds.main=3"],
    "dfq_noadv": ["rounds.warmup=2", "rounds.main=1", "rounds.student_steps=1"],
}
FEW = ["rounds.warmup=0", "rounds.main=2", "rounds.student_steps=1"]
IN_THE_FAST_SUITE = ("dfmf", "labelled")


def out_of(capsys: Capture, *argv: str | Path) -> str:
    """What a command prints; it must succeed."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def train(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Two or three rounds of a debug recipe with 60 test images; its summary."""
    small = ["evaluation.dataset.limit=60", "log.grids=false", *SHORT.get(name, FEW)]
    assert main(["train", f"debug/{name}.yaml", f"out={folder}", *small, *arguments]) == 0
    return dict(json.loads((folder / "summary.json").read_text()))


# --------------------------------------------------------------------------------------------- help, config


@pytest.mark.parametrize("command", [[], ["train"], ["config"], ["teachers", "train"], ["evaluate"], ["export"]])
def test_help(command: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: dfkd")


@pytest.mark.parametrize(
    "argv", [[], ["fuse"], ["train"], ["teachers"], ["train", "x.yaml", "--resume", "--overwrite"]]
)
def test_what_is_no_command_is_refused(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and "usage: dfkd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["debug/dfmf.yaml", "debug/labelled.yaml", "quickstart/dfmf.yaml", "debug/zskt.yaml"])
def test_a_printed_recipe_reads_back_equal(name: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "r.yaml").write_text(out_of(capsys, "config", name))
    assert load_recipe(tmp_path / "r.yaml") == load_recipe(name)


def test_a_printed_teachers_recipe_reads_back_equal(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "r.yaml").write_text(out_of(capsys, "config", "debug/teachers.yaml", "epochs=7"))
    assert load_teachers_recipe(tmp_path / "r.yaml") == load_teachers_recipe("debug/teachers.yaml", ["epochs=7"])


def test_overrides(tmp_path: Path, capsys: Capture) -> None:
    given = ["rounds.main=3", "student.arch=resnet8", "teachers.1.weight=0.5", "teachers.0.weight=1e-1", "seed=4"]
    printed = out_of(capsys, "config", "debug/dfmf.yaml", *given)
    tree = yaml.safe_load(printed)
    assert tree["rounds"]["main"] == 3 and tree["student"]["arch"] == "resnet8" and tree["seed"] == 4
    assert [t["weight"] for t in tree["teachers"]] == [0.1, 0.5]
    (tmp_path / "r.yaml").write_text(printed)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe("debug/dfmf.yaml", given)


def test_overrides_may_stand_behind_options(tmp_path: Path, capsys: Capture) -> None:
    plan = out_of(capsys, "plan", "debug/labelled.yaml", "--ranks", "1", "rounds.main=2", "--json", tmp_path / "p.json")
    assert plan and (tmp_path / "p.json").is_file()
    train(tmp_path / "run", "labelled", "--device", "cpu", "seed=9")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").seed == 9
    for wrong in (
        ["evaluate", "nowhere", "seed=1"],
        ["config", "debug/dfmf.yaml", "--sed=1"],
        ["train", "x", "--sed=1"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(
    "name", [n if n in IN_THE_FAST_SUITE else pytest.param(n, marks=pytest.mark.slow) for n in DEBUG]
)
def test_a_debug_recipe_runs_to_its_summary(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"debug/{name}.yaml")
    summary = train(tmp_path / "run", name, "seed=2")
    assert (summary["method"], summary["seed"], summary["world_size"]) == (recipe.method, 2, 1)
    assert summary["steps"] == {"labelled": 3, "dfq_noadv": 1}.get(name, 2)
    assert summary["wall_seconds"] > 0 and summary["peak_memory_bytes"][0] > 0
    assert len(summary["peak_memory_bytes"]) == 1
    assert [t["name"] for t in summary["teachers"]] == [t.name for t in recipe.teachers]
    measured = [summary["student"], *summary["teachers"]] + ([summary["ensemble"]] if recipe.teachers else [])
    assert all(0 <= one["accuracy"] <= 100 for one in measured)
    assert summary["throughput"] and all(rate > 0 for rate in summary["throughput"].values())
    assert summary["evaluation"] == {"split": "test", "samples": 60}


def test_one_more_round_of_a_finished_run_is_another_recipe(tmp_path: Path, capsys: Capture) -> None:
    first = train(tmp_path / "run", "labelled")
    again = train(tmp_path / "run", "labelled", "--resume")  # finished: nothing left but the summary
    assert again["steps"] == first["steps"] and again["student"] == first["student"]
    assert main(["train", "debug/labelled.yaml", f"out={tmp_path / 'run'}", "rounds.main=4", "--resume"]) == 2
    assert "rounds.main (was 3, now 4)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ evaluate, export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished DFMF run with a student of its own normalisation."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(folder, "dfmf", "student.mean=[0.4]", "student.std=[0.3]", "mesh.rows=1")
    return folder


def test_evaluate_finds_what_the_summary_says(run: Path, capsys: Capture) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = {k: float(v) for k, v in (line.split() for line in out_of(capsys, "evaluate", run).splitlines())}
    expected = {f"test/teacher/{t['name']}": t["accuracy"] for t in summary["teachers"]}
    expected |= {"test/AvgPred": summary["ensemble"]["accuracy"], "test/student": summary["student"]["accuracy"]}
    expected |= {"test/HighestConf": summary["highest_confidence"]["accuracy"]}
    assert found == pytest.approx(expected, abs=0.01)


def test_evaluate_on_other_images(run: Path, capsys: Capture) -> None:
    before = sorted(run.rglob("*"))
    printed = out_of(capsys, "evaluate", run, "--split", "val", "--data", "limit=7", "size=12")
    assert all(line.startswith("val/") for line in printed.splitlines())
    assert sorted(run.rglob("*")) == before
    sevenths = [float(line.split()[1]) * 7 / 100 for line in printed.splitlines()]
    assert sevenths == pytest.approx([round(s) for s in sevenths], abs=0.01)
    assert main(["evaluate", str(run), "--data", "sise=12"]) == 2
    assert "sise: unknown key" in capsys.readouterr().err


def test_a_run_of_several_rows_is_opened_by_one_process(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    (copy / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("rows: 1", "rows: 2"))
    assert open_finished(copy).mesh.topology.rows == 1


def test_an_exported_student_is_the_runs_student(run: Path, tmp_path: Path, capsys: Capture) -> None:
    printed = out_of(capsys, "export", run, "--out", tmp_path / "mine").split()
    assert printed == [str(tmp_path / "mine.safetensors"), str(tmp_path / "mine.json")]
    images = torch.rand(5, 1, 16, 16)
    with torch.no_grad():
        expected = open_finished(run).side.network.eval()(images).logits_NC
        for file in (printed[0], run / "student.safetensors"):
            assert torch.allclose(dfkd_dist.load_student(file)(images).logits_NC, expected, atol=1e-5)
    assert json.loads((tmp_path / "mine.json").read_text())["mean"] == [0.4]


@pytest.mark.slow
@pytest.mark.real
def test_an_exported_graph_says_the_same(run: Path, capsys: Capture) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    weights, _, graph = out_of(capsys, "export", run, "--onnx").split()
    assert graph == str(run / "export" / "student.onnx")
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        expected = dfkd_dist.load_student(weights)(images).logits_NC
    (found,) = ReferenceEvaluator(onnx.load(graph)).run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)


def test_a_missing_extra_is_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    code = main(["train", "debug/dfmf.yaml", f"out={tmp_path / 'run'}", "student.arch=timm/resnet18"])
    assert code == EXIT_REFUSED
    assert "pip install 'dfkd-dist[timm]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
