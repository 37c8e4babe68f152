"""The quick start, as `make quickstart` runs it: the student must really be better than its teachers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.quickstart import one

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_student_beats_its_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // 2, 1)))
    row = one(0, quick=False)
    assert min(row["frequent 0"], row["frequent 1"]) >= 98
    assert row["lead"] >= 5, row
    assert row["gap"] <= 8, row
