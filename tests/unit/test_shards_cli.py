"""`dfkd shards ...` as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dfkd_dist.cli import main
from dfkd_dist.data.shards.manifest import read_manifest
from tests.image_data import write_folder, write_jpg_npz
from tests.shards import write_shards

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *argv: object, code: int = 0) -> str:
    """What `dfkd shards` prints: its output, or (refused) its one line of error."""
    capsys.readouterr()
    found = main(["shards", *map(str, argv)])
    out, err = capsys.readouterr()
    assert found == code, out + err
    assert code != 2 or (err.count("\n") == 1 and err.startswith("error: "))
    return err if code == 2 else out


@pytest.mark.parametrize("command", [[], ["build"], ["verify"], ["info"]])
def test_help(command: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["shards", *command, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: dfkd shards")


def test_from_photos_to_a_contact_sheet(tmp_path: Path, shared_data: Callable[[str], Path], capsys: Capture) -> None:
    out = tmp_path / "photos"
    build = ["build", shared_data("photos_ood_jpg.npz"), out, "--limit", 120, "--maxcount", 50, "--size", 32]
    assert said(capsys, *build, "--workers", 1) == f"120 images in 3 shards: {out}\n"
    assert "3 shards, 120 images: nothing wrong" in said(capsys, "verify", out, "--workers", 1)
    shown = said(capsys, "info", out, "--sheet", tmp_path / "sheet.png", "--images", 9)
    assert "images    120 (120 jpg)" in shown and "height    32 / 32 / 32" in shown
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert json.loads(said(capsys, "info", out, "--json"))["samples"] == 120


def test_the_same_command_again_and_another_one(tmp_path: Path, capsys: Capture) -> None:
    build = ["build", write_jpg_npz(tmp_path / "set.npz"), tmp_path / "out", "--maxcount", 5]
    for _ in range(2):
        assert said(capsys, *build) == f"20 images in 4 shards: {tmp_path / 'out'}\n"
    assert "options.limit was None, is 6" in said(capsys, *build, "--limit", 6, code=2)
    assert said(capsys, *build, "--limit", 6, "--overwrite", "--workers", 1).startswith("6 images in 2 shards")


def test_damage_is_exit_code_1_and_cleaned(tmp_path: Path, capsys: Capture) -> None:
    folder = write_shards(tmp_path / "in")
    (folder / "000003.tar").write_bytes((folder / "000003.tar").read_bytes()[:9000])
    out, listed = tmp_path / "out", tmp_path / "findings.json"
    shown = said(capsys, "verify", folder, "--clean", out, "--json", listed, "--workers", 1, code=1)
    assert "size" in shown and "beyond the end" in shown and f"shards: {out}" in shown
    findings = json.loads(listed.read_text())["findings"]
    assert {finding["cause"] for finding in findings} == {"size", "tar", "cut"}
    assert said(capsys, "verify", out).endswith("nothing wrong\n")
    assert len(read_manifest(out)) == 43 - sum(finding["cause"] == "cut" for finding in findings)


def test_the_options_reach_the_build(tmp_path: Path, capsys: Capture) -> None:
    root = write_folder(tmp_path / "in", {"b": 4, "a": 3})
    said(capsys, "build", root, tmp_path / "out", "--size", 8, "--format", "png", "--shuffle", 3, "--unlabelled")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes is None and next(manifest.entries())["members"] == ["png"] * 7
    recipe = json.loads((tmp_path / "out" / "build.json").read_text())
    assert recipe["options"]["shuffle"] == 3 and recipe["options"]["encoding"]["size"] == 8
    (tmp_path / "list.csv").write_text("where,what\nin/a/00.png,b\nin/b/00.png,a\n")
    (tmp_path / "names.txt").write_text("b\na\n")
    columns = ["--path-column", "where", "--label-column", "what", "--classes", tmp_path / "names.txt"]
    said(capsys, "build", tmp_path / "list.csv", tmp_path / "listed", *columns)
    assert read_manifest(tmp_path / "listed").labels_N.tolist() == [0, 1]
    for path in (tmp_path / "out" / "manifest.json", tmp_path / "out" / "build.json"):
        path.unlink()
    shown = said(capsys, "build", tmp_path / "out", tmp_path / "out", "--index-only")
    assert shown == f"7 images in 1 tars: {tmp_path / 'out'}\n" and len(read_manifest(tmp_path / "out")) == 7


def test_refusals_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = write_jpg_npz(tmp_path / "set.npz")
    for argv, expected in [
        (["build", tmp_path / "nowhere", tmp_path / "out"], "nowhere: no such file or folder"),
        (["build", path, tmp_path / "out", "--maxcount", 0], "maxcount: found 0, allowed"),
        (["build", path, tmp_path / "out", "--workers", 0], "--workers: found 0, allowed"),
        (["build", path, tmp_path / "out", "--root", "x"], "root: a source of kind npz takes none"),
        (["build", path, tmp_path / "out", "--index-only", "--size", 3], "drop ['size']"),
        (["build", path, tmp_path / "out", "--index-only"], "set.npz: not a readable tar"),
        (["verify", tmp_path], "manifest.json: no such file"),
        (["info", tmp_path], "manifest.json: no such file"),
    ]:
        assert expected in said(capsys, *argv, code=2)
