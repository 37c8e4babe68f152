"""The worked example of one's own teachers: its three commands, with budgets of seconds."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_dist.models.registry import build_network
from dfkd_dist.models.weights import load_weights

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_teachers"
SHORT = ["rounds.warmup=1", "rounds.main=1", "rounds.student_steps=1", "source.assistant.steps=1", "log.grids=false"]


def run(*command: str | Path, folder: Path) -> str:
    """What a command that must succeed printed, typed in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_two_files_with_weights_to_a_student_in_use(tmp_path: Path) -> None:
    train = "import sys; from dfkd_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    made = run(EXAMPLE / "make_teachers.py", "--epochs", "1", folder=tmp_path)
    for name, channels in (("party_a", 1), ("party_b", 3)):
        file = tmp_path / "runs" / "own-teachers" / f"{name}.safetensors"
        assert f"{name}.safetensors: " in made
        assert not file.with_suffix(".json").exists()  # everything about it stands in the recipe
        load_weights(build_network("tiny", num_classes=10, in_channels=channels), file)
    printed = run("-c", train, "train", EXAMPLE / "fuse.yaml", *SHORT, folder=tmp_path)
    summary = json.loads((tmp_path / "runs" / "own-student" / "summary.json").read_text())
    assert f"{summary['student']['accuracy']:.2f} %" in printed
    # What the parties measured of their networks is what the run measures: normalisation, channels, class order.
    said = [float(x) for x in re.findall(r"images, ([0-9.]+) % right", made)]
    assert [teacher["accuracy"] for teacher in summary["teachers"]] == pytest.approx(said, abs=1.0)
    lines = run(EXAMPLE / "use_student.py", folder=tmp_path).splitlines()
    assert len(lines) == 10 and all(re.fullmatch(r"digit \d: student says \d \(\d+ % sure\)", x) for x in lines)


def test_the_front_page_shows_the_recipe_as_it_is() -> None:
    assert f"```yaml\n{(EXAMPLE / 'fuse.yaml').read_text()}```" in (ROOT / "README.md").read_text()


def test_the_teachers_are_made_without_this_package() -> None:
    tree = ast.parse((EXAMPLE / "make_teachers.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" in imported and not any(name.startswith("dfkd_dist") for name in imported)
