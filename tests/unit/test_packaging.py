"""What the wheel holds, and that its files are found from an installed wheel as from this checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dfkd_dist.resources import configs_dir, launch_dir

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dfkd_dist", "launch", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TYPED = "dfkd_dist/py.typed"


def shipped(folder: str, into: str, pattern: str) -> set[str]:
    """The names in the wheel of the files of a folder of the checkout."""
    files = (ROOT / folder).rglob(pattern)
    return {f"{into}/{path.relative_to(ROOT / folder)}" for path in files if "__pycache__" not in path.parts}


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run a command, with one folder to import from; returns what it printed, also as the test's failure."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> list[str]:
    if subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs uv in this environment: pip install dfkd-dist[dev]")
    return [sys.executable, "-m", "uv"]


@pytest.fixture(scope="module")
def wheel(uv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves its own files in the folder that it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    run(*uv, "build", "--quiet", "--wheel", "--out-dir", out, tree, cwd=tree)
    return next(out.glob("*.whl"))


def test_a_checkout_finds_its_folders() -> None:
    assert (configs_dir(), launch_dir()) == (ROOT / "configs", ROOT / "launch")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dfkd_dist", tmp_path / "dfkd_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs").mkdir()  # somebody else's: without a pyproject.toml beside it this is no checkout
    code = "from dfkd_dist.resources import *\ntry: configs_dir()\nexcept FileNotFoundError as e: print(e)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, path=tmp_path)
    assert "configs folder of dfkd-dist is missing" in said
    assert str(tmp_path / "dfkd_dist" / "configs") in said


@pytest.mark.slow
@pytest.mark.real
def test_the_wheel_holds_the_package_the_launch_programs_and_the_recipes(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    programs = shipped("launch", "dfkd_launch", "*.py") | shipped("launch", "dfkd_launch", "*.yaml")
    recipes = shipped("configs", "dfkd_dist/configs", "*.yaml")
    package = shipped("dfkd_dist", "dfkd_dist", "*.py")
    assert programs and recipes and TYPED in names
    assert package | programs | recipes <= names
    assert {name.split("/")[0] for name in names} == {"dfkd_dist", "dfkd_launch"}


@pytest.mark.slow
@pytest.mark.real
def test_an_installed_wheel_finds_its_files(uv: list[str], wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--python", sys.executable, "--target", site)
    run(*uv, "pip", "install", *options, wheel, cwd=tmp_path)
    code = "import dfkd_launch as d, dfkd_dist.resources as r\n"
    code += "print(r.configs_dir(), r.launch_dir(), *d.__path__)"
    configs, launch, imported = run(sys.executable, "-c", code, cwd=tmp_path, path=site).split()
    assert (configs, launch) == (str(site / "dfkd_dist" / "configs"), str(site / "dfkd_launch"))
    assert imported == launch
    assert "dfkd" in run(site / "bin" / "dfkd", "--help", cwd=tmp_path, path=site)
