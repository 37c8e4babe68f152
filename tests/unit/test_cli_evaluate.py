"""`dfkd evaluate` with its measures, as a person types it, on a short run of a shipped recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torchvision.io import decode_png, read_file

from dfkd_dist.cli import main
from dfkd_dist.engine.entry import EXIT_REFUSED
from dfkd_dist.engine.look.measures import Wanted
from dfkd_dist.engine.look.runs import measure_run
from dfkd_dist.parallel.launch import LaunchError
from tests.image_data import write_folder

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")
Capture = pytest.CaptureFixture[str]
FEW = ["rounds.warmup=0", "rounds.main=2", "rounds.student_steps=1", "log.grids=false", "evaluation.dataset.limit=60"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(["train", "debug/dfmf.yaml", f"out={folder}", *FEW]) == 0
    return folder


def said(capsys: Capture, *argv: str | Path) -> str:
    capsys.readouterr()
    code = main(["evaluate", *(str(a) for a in argv)])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def refused(capsys: Capture, *argv: str | Path) -> str:
    capsys.readouterr()
    assert main(["evaluate", *(str(a) for a in argv)]) == EXIT_REFUSED
    return capsys.readouterr().err


def written(folder: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return json.loads((folder / "evaluation.json").read_text())


def size(path: Path) -> tuple[int, ...]:
    return tuple(decode_png(read_file(str(path))).shape)


def test_every_measure_in_one_call(run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = sorted(run.rglob("*"))
    out = tmp_path / "out"
    measures = ["--fid", "--per-class", "--patch", "4", "8", "--balance", "--sheet", "--tsne", "--clusters"]
    few = ["--images", "60", "--points", "20", "--per-row", "4"]
    printed = said(capsys, run, "--accuracy", *measures, *few, "--out", out)
    assert sorted(run.rglob("*")) == before
    found = written(out)
    assert set(found) == {"accuracy", "fid", "patch_fid", "balance", "sheet", "tsne", "clusters"}
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json",
        "balance.png",
        "sheet.png",
        "tsne.png",
        "clusters.png",
    }
    assert found["fid"]["pool"] == "generators" and found["fid"]["real"] == "digits (test)"
    assert found["fid"]["pool_images"] == found["fid"]["real_images"] == 60
    assert len(found["fid"]["by_class"]["classes"]) == len(found["balance"]["classes"]) == 10
    assert sum(entry["images"] for entry in found["balance"]["classes"]) == 60
    assert [entry["size"] for entry in found["patch_fid"]["sizes"]] == [4, 8]
    assert sum(row["found"] for row in found["sheet"]["rows"]) == 60
    assert [group["points"] for group in found["tsne"]["groups"]] == [20, 20]
    assert found["accuracy"]["test/student"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["student"]["accuracy"]
    )
    assert size(out / "sheet.png")[1] == 2 + 10 * 34  # ten rows of 16 pixels, twice as large, and their gaps
    for text in ("test/student", "FID of generators against digits (test)", "patch FID", "class balance", "sheet: "):
        assert text in printed
    again = said(capsys, run, "--accuracy", *measures, *few, "--out", out)
    assert again == printed and written(out) == found  # nothing is drawn anew at random


def test_results_stand_in_the_run_and_gather(run: Path, capsys: Capture) -> None:
    said(capsys, run, "--fid", "--images", "30")
    said(capsys, run, "--balance", "--judge", "student", "--images", "30")
    found = written(run / "evaluation")
    assert set(found) == {"fid", "balance"} and found["balance"]["judge"] == "student"
    assert Path(found["balance"]["picture"]) == run / "evaluation" / "balance.png"


def test_other_images_and_networks(run: Path, tmp_path: Path, capsys: Capture) -> None:
    write_folder(tmp_path / "photos", {"a": 12, "b": 12})
    where = ["--out", tmp_path / "out"]
    said(capsys, run, "--fid", "--pool", tmp_path / "photos", "--features", "student", *where)
    found = written(tmp_path / "out")["fid"]
    assert (found["pool"], found["pool_images"], found["features_of"]) == (str(tmp_path / "photos"), 24, "student")
    real = ["--real", "kind=digits", "split=train", "limit=50"]
    said(capsys, run, "--fid", *real, "--pool", "data", "--split", "test", *where)
    found = written(tmp_path / "out")["fid"]
    assert (found["real"], found["real_images"], found["pool"]) == ("digits (train)", 50, "digits (test)")
    said(capsys, run, "--clusters", "--beside", run, "--points", "30", *where)
    maps = written(tmp_path / "out")["clusters"]["maps"]
    assert [one["features"] for one in maps] == ["student", str(run)]
    wide = size(tmp_path / "out" / "clusters.png")
    said(capsys, run, "--clusters", "--points", "30", *where)
    assert wide[2] == 2 * size(tmp_path / "out" / "clusters.png")[2]


def test_accuracy_alone_is_kept_where_a_folder_is_named(run: Path, tmp_path: Path, capsys: Capture) -> None:
    said(capsys, run, "--split", "val", "--out", tmp_path / "out")
    assert all(name.startswith("val/") for name in written(tmp_path / "out")["accuracy"])


def test_the_same_network_may_be_judge_and_features(run: Path, tmp_path: Path) -> None:
    wanted = Wanted(fid=True, per_class=True, images=40, features="student", judge="student", predicted=True)
    found = measure_run(run, wanted, out=tmp_path)
    assert found["fid"]["by_class"]["real_classes_by"] == "student" and written(tmp_path) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fid", "--pool", "stream"], "reads no stream"),
        (["--balance", "--judge", "nobody"], "judge 'nobody': no such network"),
        (["--fid", "--features", "nobody"], "features 'nobody': no such network"),
        (["--sheet", "--rows", "dragon"], "unknown classes ['dragon']"),
        (["--patch", "99"], "patch size 99: allowed: 1 to 16"),
        (["--fid", "--data", "sise=3"], "sise: unknown key"),
    ],
)
def test_wrong_requests_are_refused(
    run: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, run, *arguments, "--images", "20", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_looked_up_before_anything_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfkd_dist.engine.look import fid as fids

    monkeypatch.setattr(fids, "fid", lambda *_, **__: pytest.fail("measured first"))
    for wrong in ({"judge": "nobody"}, {"pool": ("nowhere",)}, {"real": ("generator=t9",)}):
        wanted = Wanted(fid=True, balance=True, images=20, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="nobody|nowhere|t9"):
            measure_run(run, wanted, out=tmp_path)


def test_odd_arguments(run: Path, capsys: Capture) -> None:
    for arguments, message in (
        (["--fid", "--features", "t0", "--inception", "x.pt"], "not allowed with"),
        (["--patch", "0"], "at least 1"),
        (["--patch"], "expected at least one"),
        (["--pool", "data", "--per-row", "3"], "--pool, --per-row: of no use without a measure"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", str(run), *arguments])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_several_ranks_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    with pytest.raises(LaunchError, match="one process, but 2 were started"):
        measure_run(run, Wanted(fid=True))
