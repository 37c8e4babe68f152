"""A debug recipe under every launcher that the documentation names: real launchers and processes, gloo on this CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dfkd_dist.models.weights import load_state, save_weights
from tests.recipes import dfmf, write_teachers

pytestmark = [pytest.mark.e2e, pytest.mark.real]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "accelerate"
PROGRAM = ROOT / "launch" / "train.py"
BIN = Path(sys.executable).parent
LIMIT_S = 240.0
STEPS = 2
SHORT = ["rounds.warmup=1", f"rounds.main={STEPS}", "rounds.student_steps=1"]
SMALL = ["source.assistant.steps=1", "evaluation.dataset.limit=60", "evaluation.every=0", "log.grids=false"]


def tool(name: str) -> str:
    """A launcher beside this Python."""
    path = BIN / name
    if not path.is_file():
        pytest.skip(f"{name} is not installed beside {sys.executable}")
    return str(path)


def accelerate(config: str, *options: str) -> list[str]:
    return [tool("accelerate"), "launch", "--config_file", str(CONFIGS / f"{config}.yaml"), *options]


def training(out: Path, *arguments: str) -> list[str]:
    return [str(PROGRAM), "debug/dfmf.yaml", f"out={out}", *SMALL, *SHORT, *arguments]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Somewhere else than in the checkout, and without what an outer launcher may have left in the environment."""
    outer = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed; a launcher that hangs is killed and fails the test."""
    try:
        printed, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher takes its ranks along
        try:
            printed, _ = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            printed = "(killed)"
        pytest.fail(f"still running after {LIMIT_S:g} s: {process.args}\n{printed[-4000:]}")
    return process.returncode, printed


def launched(command: list[str], folder: Path) -> str:
    """What a command that must succeed printed."""
    code, printed = finish(start(command, folder))
    assert code == 0, printed[-6000:]
    return printed


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def check_summary(run: Path, size: int, rows: int) -> None:
    found, mesh = summary(run), json.loads((run / "mesh.json").read_text())
    assert (found["world_size"], found["steps"], len(found["peak_memory_bytes"])) == (size, STEPS, size)
    assert (mesh["rows"], mesh["columns"]) == (rows, size // rows)
    assert [p.name for p in run.parent.iterdir()] == [run.name]


def test_accelerate_starts_the_ranks_of_one_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = launched([*accelerate("cpu", "--num_processes", "2"), *training(run)], tmp_path)
    check_summary(run, size=2, rows=2)
    assert printed.count(f"{STEPS} student steps in") == 1  # the table, from one rank only


@pytest.mark.slow
def test_accelerate_that_would_start_one_process_is_refused(tmp_path: Path) -> None:
    command = [tool("accelerate"), "launch", "--cpu", "--num_processes", "2", *training(tmp_path / "run")]
    code, printed = finish(start(command, tmp_path))
    assert code != 0
    for said in ("error: accelerate launch was asked for 2 processes", "WORLD_SIZE here is 1", "accelerate/cpu.yaml"):
        assert said in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_starts_the_same_program(tmp_path: Path) -> None:
    command = [tool("torchrun"), "--standalone", "--nproc_per_node", "2", *training(tmp_path / "run", "mesh.rows=1")]
    launched(command, tmp_path)
    check_summary(tmp_path / "run", size=2, rows=1)


@pytest.mark.slow
def test_plain_python_is_a_single_process(tmp_path: Path) -> None:
    launched([sys.executable, *training(tmp_path / "run")], tmp_path)
    check_summary(tmp_path / "run", size=1, rows=1)


@pytest.mark.slow
def test_two_nodes_on_one_machine(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--gpu_ids=-1,-1"]
    nodes = []
    for rank in range(2):
        count = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        nodes.append(start([*accelerate("multi_node", *count, *where), *training(tmp_path / "run")], tmp_path))
    for code, printed in [finish(node) for node in nodes]:
        assert code == 0, printed[-6000:]
    check_summary(tmp_path / "run", size=2, rows=2)


@pytest.mark.slow
def test_a_teacher_that_one_rank_alone_sees_to_be_bad_stops_all_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dfmf(write_teachers(tmp_path, 2), out=str(tmp_path / "run"))))
    state = load_state(tmp_path / "teacher_1.safetensors")
    state["conv1.weight"] = torch.full_like(state["conv1.weight"], float("nan"))
    save_weights(state, tmp_path / "teacher_1.safetensors")
    started = time.monotonic()
    command = [tool("torchrun"), "--standalone", "--nproc_per_node", "2", str(PROGRAM), str(recipe)]
    code, printed = finish(start(command, tmp_path))
    assert code != 0 and time.monotonic() - started < LIMIT_S / 2
    assert "error: teacher t1" in printed and "NaN or infinity in: conv1.weight" in printed
    assert 'Traceback (most recent call last):\n  File "' + str(PROGRAM) not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_the_launcher_is_a_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    run, rounds = tmp_path / "run", 120
    longer = ["rounds.warmup=0", f"rounds.main={rounds}", "checkpoint.every=0", "log.every=1"]
    command = [*accelerate("cpu", "--num_processes", "2"), *training(run, *longer)]
    process = start(command, tmp_path)
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + LIMIT_S
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"no rounds: {finish(process)[1][-4000:]}")
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process)
    assert code != 0 and "resume with --resume" in printed
    assert not (run / "summary.json").exists() and any((run / "checkpoints").iterdir())
    printed = launched([*command, "--resume"], tmp_path)
    assert "resumed at round" in printed
    assert summary(run)["steps"] == rounds
    logged = [json.loads(line)["round"] for line in metrics.read_text().splitlines()]
    assert logged == list(range(1, rounds + 1))
