"""The worked example of web images, with budgets of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_example import ROOT, run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLE = ROOT / "examples" / "web_images"
DFKD = "import sys; from dfkd_dist.cli import main; sys.exit(main(sys.argv[1:]))"


def test_from_a_folder_of_images_to_a_student(tmp_path: Path) -> None:
    run("-c", DFKD, "teachers", "train", EXAMPLE / "teacher.yaml", "epochs=2", folder=tmp_path)
    run(EXAMPLE / "make_folder.py", folder=tmp_path)
    shards = "runs/web-images/shards"
    run("-c", DFKD, "shards", "build", "runs/web-images/images", shards, "--on-bad", "skip", folder=tmp_path)
    assert "nothing wrong" in run("-c", DFKD, "shards", "verify", shards, folder=tmp_path)
    printed = run("-c", DFKD, "train", EXAMPLE / "distil.yaml", "rounds.main=1", "evaluation.every=0", folder=tmp_path)
    summary = json.loads((tmp_path / "runs" / "web-images" / "run" / "summary.json").read_text())
    assert summary["steps"] == 31 and f"{summary['student']['accuracy']:.2f} %" in printed
    chosen = tmp_path / "chosen.jsonl"
    table = run("-c", DFKD, "select", EXAMPLE / "distil.yaml", "--out", chosen, folder=tmp_path)
    assert "chosen         4,000" in table and sum(1 for _ in chosen.open()) == 4001
