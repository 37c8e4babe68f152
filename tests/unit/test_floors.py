"""Who may import whom: floors, owners of outside libraries, file lengths; and the base install."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A part is the first name below dfkd_dist (a sub-package or a module), or the top-level folder launch/.
FLOORS = {
    "resources": 0,  # where the shipped files are; the recipe schema asks it
    "__init__": 2,  # offers `load_student`
    "config": 1,
    "models": 1,
    "losses": 1,
    "data": 2,
    "parallel": 2,
    "sources": 3,
    "objectives": 3,
    "compensation": 3,
    "engine": 4,
    "cli": 5,
    "cli_evaluate": 5,
    "cli_select": 5,
    "cli_shards": 5,
    "cli_synthesize": 5,
    "launch": 5,
    "__main__": 6,
}
# An outside library, and the one part (or file) that may import it.
OWNERS = {
    "torch.distributed": "dfkd_dist/parallel/",
    "accelerate": "dfkd_dist/parallel/",
    "deepspeed": "dfkd_dist/parallel/",
    "webdataset": "dfkd_dist/data/",
    "ffcv": "dfkd_dist/data/",
    "submitit": "launch/",
    "torch.utils.tensorboard": "dfkd_dist/engine/trackers.py",
    "tensorboard": "dfkd_dist/engine/trackers.py",
}
EXTRAS = ["timm", "onnx", "onnxscript", "tensorboard", "torch.utils.tensorboard", "matplotlib"]
EXTRAS += ["ffcv", "submitit", "deepspeed", "torchmetrics", "torch_fidelity"]
MAX_LINES, MAX_TRAIN_LINES = 450, 80


class Import(NamedTuple):
    """One dotted name that a file reaches for; ``lazy`` where that happens inside a function."""

    name: str
    line: int
    lazy: bool


def package_of(path: str) -> str:
    """dfkd_dist/models/zoo/nets.py -> dfkd_dist.models.zoo: what a relative import starts from."""
    return path.rpartition("/")[0].replace("/", ".")


def part_of(path: str) -> str:
    """dfkd_dist/models/zoo/nets.py -> models; dfkd_dist/config.py -> config; launch/train.py -> launch."""
    first, *rest = path.removesuffix(".py").split("/")
    return rest[0] if first == "dfkd_dist" else first


def imports_of(source: str, path: str) -> Iterator[Import]:
    """Every import of a file: statements, import_module("literal"), and uses of torch.distributed."""
    yield from _walk(ast.parse(source), path, lazy=False)


def _walk(node: ast.AST, path: str, lazy: bool) -> Iterator[Import]:
    for name in _names(node, path):
        yield Import(name, getattr(node, "lineno", 0), lazy)
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, path, lazy)


def _names(node: ast.AST, path: str) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            return [f"{_base(module, level, path)}.{alias.name}" for alias in names]
        case ast.Call(func=called, args=[ast.Constant(value=str(name)), *_]):
            return [name] if _dotted(called).rpartition(".")[2] in ("import_module", "__import__") else []
        case ast.Attribute():
            return [name] if (name := _dotted(node)).startswith("torch.") else []
    return []


def _base(module: str | None, level: int, path: str) -> str:
    if level == 0:
        return module or ""
    parents = package_of(path).split(".")
    return ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_under(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def imported_part(name: str) -> str | None:
    """The part of this project that a dotted name belongs to, or None for the outside world."""
    first, *rest = name.split(".")
    if first in ("launch", "dfkd_launch"):
        return "launch"
    if first != "dfkd_dist":
        return None
    return rest[0] if rest and rest[0] in FLOORS else "__init__"


def violations(source: str, path: str) -> list[str]:
    """What a file does against the rules, one readable line each; ``path`` is relative to the checkout."""
    mine = part_of(path)
    if mine not in FLOORS:
        return [f"{path}: '{mine}' has no floor; known parts: {', '.join(FLOORS)}"]
    found = []
    for item in imports_of(source, path):
        found += [f"{path}:{item.line}: {fault}" for fault in _faults(item, mine, path)]
    limit = MAX_TRAIN_LINES if path == "launch/train.py" else MAX_LINES
    if (lines := source.count("\n")) > limit:
        found.append(f"{path}: {lines} lines, at most {limit}")
    return sorted(set(found))


def _faults(item: Import, mine: str, path: str) -> Iterator[str]:
    for library, owner in OWNERS.items():
        if is_under(item.name, library) and not path.startswith(owner):
            yield f"only {owner} may import {library}"
    theirs = imported_part(item.name)
    if theirs is None or theirs in (mine, "__init__"):
        return
    if mine == "cli" and theirs.startswith("cli_"):  # one command's part of the same program
        return
    if (mine, theirs) == ("cli", "launch"):
        if not item.lazy:
            yield "cli may import dfkd_launch inside a function only"
    elif FLOORS[theirs] >= FLOORS[mine]:
        yield f"{mine} (floor {FLOORS[mine]}) may not import {theirs} (floor {FLOORS[theirs]})"


def project_files() -> list[str]:
    found = [*(ROOT / "dfkd_dist").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def test_the_project_keeps_its_floors() -> None:
    paths = project_files()
    assert "dfkd_dist/resources.py" in paths  # a checker that looks at nothing finds nothing
    found = [line for path in paths for line in violations((ROOT / path).read_text(encoding="utf-8"), path)]
    assert not found, "\n" + "\n".join(found)


KL, NETS, LOOP = "dfkd_dist/losses/kl.py", "dfkd_dist/models/zoo/nets.py", "dfkd_dist/engine/loop.py"
POOL, MESH, REPORT = "dfkd_dist/data/pool.py", "dfkd_dist/parallel/mesh.py", "dfkd_dist/engine/report.py"
CLI, TRAIN = "dfkd_dist/cli.py", "launch/train.py"
BAD = [  # file, what it holds, what is said about it
    (KL, "from dfkd_dist.models import zoo", "losses (floor 1) may not import models"),
    (KL, "from ..models.zoo import nets", "losses (floor 1) may not import models"),
    (KL, "from dfkd_dist import config", "losses (floor 1) may not import config"),
    (KL, "from .. import engine", "losses (floor 1) may not import engine"),
    (NETS, "from ...parallel import mesh", "models (floor 1) may not import parallel"),
    ("dfkd_dist/models/zoo/__init__.py", "from ...losses import kl", "may not import losses (floor 1)"),
    (POOL, "def f():\n    import dfkd_dist.parallel.mesh", "may not import parallel (floor 2)"),
    (LOOP, "import dfkd_launch.train", "engine (floor 4) may not import launch (floor 5)"),
    ("dfkd_dist/config.py", "import_module('dfkd_dist.models.zoo')", "may not import models (floor 1)"),
    (CLI, "import dfkd_launch", "inside a function only"),
    (TRAIN, "from dfkd_dist.cli import main", "launch (floor 5) may not import cli"),
    (TRAIN, "x = 1\n" * 81, "81 lines, at most 80"),
    (POOL, "\n" * 451, "451 lines, at most 450"),
    ("dfkd_dist/helpers.py", "", "'helpers' has no floor"),
    (KL, "torch.distributed.all_reduce(x)", "parallel/ may import torch.distributed"),
    (KL, "from torch import distributed", "parallel/ may import torch.distributed"),
    (KL, "import torch.distributed as d", "parallel/ may import torch.distributed"),
    (LOOP, "from accelerate import Accelerator", "parallel/ may import accelerate"),
    (TRAIN, "import deepspeed", "parallel/ may import deepspeed"),
    (MESH, "import webdataset", "only dfkd_dist/data/ may import webdataset"),
    (CLI, "def f():\n    import submitit", "only launch/ may import submitit"),
    (REPORT, "from torch.utils.tensorboard import SummaryWriter", "only dfkd_dist/engine/tr"),
    (REPORT, "from torch.utils import tensorboard", "only dfkd_dist/engine/trackers.py"),
]
GOOD = [
    (NETS, "from . import blocks\nfrom ..heads import bn\nfrom dfkd_dist.models import zoo"),
    ("dfkd_dist/sources/terms.py", "from dfkd_dist import losses, resources\nfrom dfkd_dist.config import S"),
    (MESH, "import torch.distributed as dist\nfrom accelerate import PartialState"),
    ("dfkd_dist/data/reader.py", "def f():\n    import webdataset, ffcv"),
    ("dfkd_dist/engine/trackers.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    (CLI, "from dfkd_dist.engine import build\ndef f():\n    import dfkd_launch.jobs"),
    (KL, "torch.nn.functional.kl_div(a.distributed, b)\nimport accelerated"),
    ("launch/jobs.py", "import submitit\nfrom dfkd_dist.engine import build\nfrom . import train"),
]


@pytest.mark.parametrize(("path", "source", "expected"), BAD)
def test_the_checker_sees_a_fault(path: str, source: str, expected: str) -> None:
    assert any(expected in line for line in violations(source, path)), violations(source, path)


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_the_checker_lets_good_code_pass(path: str, source: str) -> None:
    assert violations(source, path) == []


# Run in a process of its own: hides the extras as if not installed, imports every module, prints what failed.
IMPORT_ALL = """
import importlib, json, sys

extras, modules = json.loads(sys.argv[1])

class Hide:
    '''A finder that does not know the extras: importlib.util.find_spec() answers None, as without them.'''
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if any(name == extra or name.startswith(extra + ".") for extra in extras):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException as error:
        failures[module] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""


def import_all(modules: list[str], folder: Path) -> dict[str, str]:
    """Import modules from a folder in a process without the extras; returns the error of each that failed."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps([EXTRAS, modules])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_without_the_extras() -> None:
    paths = [path.removesuffix(".py") for path in project_files() if path.startswith("dfkd_dist/")]
    names = [path.removesuffix("/__init__").replace("/", ".") for path in paths]
    modules = [name for name in names if not name.endswith(".__main__")]
    failures = import_all(modules, ROOT)
    assert not failures, "\n" + "\n".join(f"{module}: {error}" for module, error in failures.items())


def test_the_import_check_sees_an_extra(tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text("import matplotlib.pyplot\n")
    (tmp_path / "lazy.py").write_text("import importlib.util as u\nassert u.find_spec('timm') is None\n")
    failures = import_all(["eager", "lazy"], tmp_path)
    assert list(failures) == ["eager"] and "matplotlib" in failures["eager"]
