"""Settings of every test, the finder of the shared data, and the rule that CI skips no real component."""

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# Before torch, matplotlib or a child process reads them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The path of a file of ../shared/data, imported or as a fixture; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared data that is not on this machine: ../shared/data/{name}")
    return path


@pytest.fixture(name="shared_data", scope="session")
def _shared_data() -> Callable[[str], Path]:
    return shared_data


@pytest.fixture(scope="session", autouse=True)
def _numerics() -> None:
    """One thread, because ranks share the cores; no denormals, because they slow small games down."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _ci() -> bool:
    return os.environ.get("CI") == "true"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With CI=true, a skip of a test marked ``real`` becomes a failure that gives the skip's reason."""
    report = yield
    if _ci() and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("real"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} drives a real component and CI=true forbids to skip it: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for a file that skips itself on import: it has no marks yet, so its text is asked."""
    report = yield
    if _ci() and report.skipped and isinstance(collector, pytest.File):
        if "mark.real" in collector.path.read_text(encoding="utf-8"):
            report.outcome = "failed"
            report.longrepr = f"{collector.nodeid} tests a real component and CI=true forbids to skip it"
    return report
