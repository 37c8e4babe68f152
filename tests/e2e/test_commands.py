"""The wheel as a person uses it: installed beside its dependencies, commands typed in an empty directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_packaging import ROOT, SOURCES

pytestmark = [pytest.mark.e2e, pytest.mark.real, pytest.mark.slow]

SMALL = [
    "rounds.warmup=0",
    "rounds.main=1",
    "rounds.student_steps=1",
    "evaluation.dataset.limit=60",
    "evaluation.every=0",
]


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a command that must succeed printed; it sees the packages under `path` before all others."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(path)} if path is not None else {}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, built from a copy of the checkout."""
    uv = [sys.executable, "-m", "uv"]
    if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs uv in this environment: pip install dfkd-dist[dev]")
    tree, out, site = (tmp_path_factory.mktemp(name) for name in ("tree", "wheel", "site"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    run(*uv, "build", "--quiet", "--wheel", "--out-dir", out, tree, cwd=tree)
    wheel = next(out.glob("*.whl"))
    run(*uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", site, wheel, cwd=out)
    return site


def test_from_a_shipped_recipe_to_an_exported_student(site: Path, tmp_path: Path) -> None:
    dfkd = site / "bin" / "dfkd"
    assert "name: debug_dfmf" in run(dfkd, "config", "debug/dfmf.yaml", cwd=tmp_path, path=site)
    assert list(tmp_path.iterdir()) == []
    printed = run(dfkd, "train", "debug/dfmf.yaml", *SMALL, cwd=tmp_path, path=site)
    home = tmp_path / "runs" / "debug_dfmf"
    accuracy = json.loads((home / "summary.json").read_text())["student"]["accuracy"]
    assert f"{accuracy:.2f}" in printed
    assert f"{accuracy:.2f}" in run(dfkd, "evaluate", home, cwd=tmp_path, path=site)
    run(dfkd, "export", home, cwd=tmp_path, path=site)
    code = "import sys, torch, dfkd_dist\n"
    code += "print(dfkd_dist.__file__, *dfkd_dist.load_student(sys.argv[1])(torch.rand(2, 1, 16, 16)).logits_NC.shape)"
    student = home / "export" / "student.safetensors"
    found = run(sys.executable, "-c", code, student, cwd=tmp_path, path=site).split()
    assert found == [str(site / "dfkd_dist" / "__init__.py"), "2", "10"]


def test_the_wheels_own_program_under_a_launcher(site: Path, tmp_path: Path) -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    command = (torchrun, "--standalone", "--nproc_per_node", "2", "-m", "dfkd_launch.train", "debug/dfmf.yaml", *SMALL)
    run(*command, "log.grids=false", cwd=tmp_path, path=site)
    assert json.loads((tmp_path / "runs" / "debug_dfmf" / "summary.json").read_text())["world_size"] == 2
