"""Launch facts: read from an environment given as a dictionary; refusals; what the accelerate files really start."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch

from dfkd_dist.parallel import launch
from dfkd_dist.parallel.launch import LaunchError, LaunchFacts, join, launch_facts, refuse_silent_single

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "accelerate"
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_an_empty_environment_is_a_single_process():
    assert launch_facts({}) == LaunchFacts()
    assert launch_facts({"ACCELERATE_USE_CPU": "True"}).use_cpu


def test_torchrun_variables_are_read():
    facts = launch_facts(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert facts == LaunchFacts(5, 8, 1, 4, "node0", 29500, node_rank=1, agent_store=True, attempt=2)
    assert launch_facts(TORCHRUN | {"GROUP_RANK": "3"}).node_rank == 3


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_half_set_environment_names_what_is_missing(name):
    for environ in ({**TORCHRUN, name: ""}, {key: value for key, value in TORCHRUN.items() if key != name}):
        with pytest.raises(LaunchError, match=rf"but {name} not set"):
            launch_facts(environ)
    with pytest.raises(LaunchError, match=f"{name}={TORCHRUN[name]} but"):
        launch_facts({name: TORCHRUN[name]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "RANK=8 must be at least 0 and below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be at least 0 and below LOCAL_WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK must be a whole number, not '-1'"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT must be a whole number, not 'auto'"),
    ],
)
def test_impossible_values_are_named(change, said):
    with pytest.raises(LaunchError, match=said):
        launch_facts(TORCHRUN | change)


def parents(*arguments: str) -> list[list[str]]:
    """The command lines under which the three ways to call accelerate's launcher appear."""
    return [
        ["/venv/bin/python", "/venv/bin/accelerate", "launch", *arguments],
        ["/venv/bin/python", "/venv/bin/accelerate-launch", *arguments],
        ["python", "-m", "accelerate.commands.launch", *arguments],
    ]


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("flag", [["--num_processes", "4"], ["--num-processes=4"]])
def test_a_silent_single_process_is_refused(flag, way):
    parent = parents("--cpu", *flag, "train.py", "--num_processes", "9")[way]
    with pytest.raises(LaunchError) as refusal:
        refuse_silent_single({}, parent)
    for said in ("asked for 4 processes", "WORLD_SIZE here is 1", "accelerate/cpu.yaml --num_processes 4"):
        assert said in str(refusal.value)
    refuse_silent_single({"WORLD_SIZE": "4"}, parent)


def test_the_count_in_a_config_file_counts(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 3, "use_cpu": True}))
    parent = parents("--config_file", str(config), "train.py")[0]
    with pytest.raises(LaunchError, match="asked for 3 processes"):
        refuse_silent_single({}, parent)
    refuse_silent_single({}, parents("--config_file", str(config), "--num_processes", "1", "train.py")[0])


def test_an_uneven_count_over_machines_is_refused():
    parent = parents("--multi_gpu", "--num_machines", "2", "--num_processes", "5", "train.py")[0]
    with pytest.raises(LaunchError, match="asked for 5 .* WORLD_SIZE here is 4. The count must be a multiple"):
        refuse_silent_single({"WORLD_SIZE": "4"}, parent)


def test_the_traces_in_the_environment_count_behind_a_wrapper():
    traces = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match="asked for several processes"):
        refuse_silent_single(traces, ["bash", "wrapper.sh"])


@pytest.mark.parametrize(
    ("environ", "parent"),
    [
        ({}, []),
        ({}, ["bash"]),
        ({"MASTER_ADDR": "a"}, ["python", "accelerate.py", "launch"]),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["python", "/bin/accelerate", "launch", "--cpu", "train.py"]),
        ({}, ["python", "/bin/accelerate", "launch", "--num_processes", "1", "train.py"]),
        (TORCHRUN, ["python", "/bin/torchrun", "--nproc_per_node", "4", "train.py"]),
    ],
)
def test_honest_launches_pass(environ, parent, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    refuse_silent_single(environ, parent)


def test_a_single_process_joins_nothing():
    device = join(LaunchFacts(), timeout_s=1.0, device="cpu")
    assert device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    with pytest.raises(LaunchError, match="device must be"):
        join(LaunchFacts(), timeout_s=1.0, device="gpu")


@pytest.mark.parametrize(
    ("seen", "local_rank", "device", "expected"),
    [
        (0, 1, "auto", "cpu"),
        (4, 2, "auto", "cuda:2"),
        (4, 2, "cpu", "cpu"),
        (1, 3, "auto", "cuda:0"),  # Slurm shows each task its own GPU only
        (2, 3, "auto", None),
        (0, 0, "cuda", None),
    ],
)
def test_the_device_follows_what_this_process_sees(monkeypatch, seen, local_rank, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    facts = LaunchFacts(local_rank, 4, local_rank, 4)
    if expected is None:
        with pytest.raises(LaunchError, match=f"has no GPU: this process sees {seen}"):
            launch._device(facts, device)
    else:
        assert launch._device(facts, device) == torch.device(expected)


def test_a_gpu_that_the_launcher_withdrew_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch._device(LaunchFacts(use_cpu=True), "auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("cpu", ["--num_processes", "4"], {"nproc_per_node": "4", "gpu_ids": "-1,-1"}),
        ("single_node", ["--num_processes", "8"], {"nproc_per_node": "8", "gpu_ids": "all"}),
        (
            "multi_node",
            ["--num_processes=16", "--main_process_ip=n1", "--machine_rank=1", "--gpu_ids=-1,-1"],
            {"nproc_per_node": "8", "nnodes": "2", "node_rank": 1, "rdzv_endpoint": "n1:29500"},
        ),
        (
            "multi_node",
            ["--num_processes=12", "--num_machines=3", "--main_process_ip=n1", "--main_process_port=7777"],
            {"nproc_per_node": "4", "nnodes": "3", "node_rank": 0, "rdzv_endpoint": "n1:7777"},
        ),
    ],
)
def test_the_config_files_choose_the_launcher_of_several_processes(config, arguments, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr(accelerate_launch, "multi_gpu_launcher", chosen.append)
    monkeypatch.setattr(accelerate_launch, "simple_launcher", lambda args: pytest.fail("started one process"))
    command = ["--config_file", str(CONFIGS / f"{config}.yaml"), *arguments, "train.py"]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(command))
    args = chosen[0]
    accelerate_launch.prepare_multi_gpu_env(args)
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.mixed_precision == "no" and args.dynamo_backend == "no"


@pytest.mark.parametrize("config", ["single_node", "multi_node"])
def test_gpu_configs_insist_on_a_count(config):
    command = ["--config_file", str(CONFIGS / f"{config}.yaml"), "train.py"]
    with pytest.raises(ValueError, match="--num_processes"):
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(command))
