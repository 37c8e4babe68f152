"""How this process was started, and joining the other ranks.

torchrun, ``accelerate launch`` and the Slurm jobs all describe a rank by the same six environment variables;
`launch_facts` reads them, `join` meets the other ranks. Nothing here guesses: a half-set environment, a launcher that
started fewer processes than it was asked for, or a process group of another size is a `LaunchError`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TRUE = ("1", "true", "yes", "on")


class LaunchError(ValueError):
    """This process was not started as was asked for, or cannot join its peers; the message says what to type."""


@dataclass(frozen=True)
class LaunchFacts:
    """Where this process stands among the processes of the run; the default is a single process.

    ``agent_store``: the launcher's agent, not rank 0, hosts the key-value store at master_addr:master_port.
    ``attempt``: how often torchrun has restarted the ranks. ``use_cpu``: the launcher was told to leave GPUs alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    node_rank: int = 0
    agent_store: bool = False
    attempt: int = 0
    use_cpu: bool = False


def launch_facts(environ: Mapping[str, str] = os.environ) -> LaunchFacts:
    """Read the variables that torchrun, accelerate and the Slurm jobs set; none of them means a single process.

    Raises LaunchError if only some are set, or a value is impossible.
    """
    use_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if len(missing) == len(_VARIABLES):
        return LaunchFacts(use_cpu=use_cpu)
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in _VARIABLES if name not in missing)
        raise LaunchError(
            f"the environment describes a rank only in part: {present} but {', '.join(missing)} not set. Start the run "
            f"with torchrun, accelerate launch or a Slurm job, or unset these variables to run as a single process."
        )
    facts = LaunchFacts(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        node_rank=_node_rank(environ),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in _TRUE,
        attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT", "0"),
        use_cpu=use_cpu,
    )
    for name, rank, size in (
        ("RANK", facts.rank, facts.world_size),
        ("LOCAL_RANK", facts.local_rank, facts.local_world_size),
    ):
        if not 0 <= rank < size:
            size_name = name.replace("RANK", "WORLD_SIZE")
            raise LaunchError(f"{name}={rank} must be at least 0 and below {size_name}={size}")
    return facts


def refuse_silent_single(environ: Mapping[str, str] = os.environ, argv_of_parent: Sequence[str] | None = None) -> None:
    """Raise LaunchError if ``accelerate launch`` was asked for N processes and started another number.

    ``accelerate launch --cpu --num_processes 4`` starts one process and says nothing. What was asked is read from the
    parent's command line (``argv_of_parent``, by default looked up) and its config file; failing that, from the traces
    that accelerate leaves in the environment. Call it before `launch_facts`.
    """
    argv = _parent_argv() if argv_of_parent is None else list(argv_of_parent)
    asked = _asked_of_accelerate(argv)
    started = environ.get("WORLD_SIZE") or "1"
    if asked is not None and asked != started:
        raise LaunchError(_refusal(f"asked for {asked} processes ({' '.join(argv)})", started, asked))
    # accelerate's one-process launcher sets MASTER_ADDR only when it was asked for more than one process.
    launched = any(name.startswith("ACCELERATE_") for name in environ)
    if asked is None and launched and environ.get("MASTER_ADDR") and not environ.get("WORLD_SIZE"):
        raise LaunchError(_refusal("asked for several processes", started, "N"))


def join(facts: LaunchFacts, *, timeout_s: float, backend: str | None = None, device: str = "auto") -> torch.device:
    """Join the default process group and return this rank's device (``device``: auto, cpu or cuda).

    auto is ``cuda:local_rank`` where there are GPUs that the launcher did not withdraw, else the CPU. The backend
    follows: nccl for cuda, gloo for cpu. A single process joins nothing. Raises LaunchError if the device does not
    exist or if the group that came about has another size (N trainings that do not know of each other).
    """
    place = _device(facts, device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if facts.world_size == 1:
        return place
    if dist.is_initialized():
        raise LaunchError("join() was called, but this process has already joined a process group")
    dist.init_process_group(
        backend or ("nccl" if place.type == "cuda" else "gloo"),
        store=open_store(facts, timeout_s, serve=not facts.agent_store and facts.rank == 0),
        rank=facts.rank,
        world_size=facts.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    present = torch.ones(1, device=place)
    dist.all_reduce(present)
    if not dist.get_world_size() == facts.world_size == int(present.item()):
        raise LaunchError(
            f"WORLD_SIZE={facts.world_size}, but the process group has {dist.get_world_size()} ranks of which "
            f"{int(present.item())} answered"
        )
    return place


def join_at(rank: int, size: int, where: int | str, *, timeout_s: float = 60.0) -> torch.device:
    """Join gloo ranks on this machine's CPU without a launcher: ``where`` is a free port or an init method (URL)."""
    if isinstance(where, int):
        facts = LaunchFacts(rank, size, rank, size, master_port=where)
        return join(facts, timeout_s=timeout_s, device="cpu")
    if size > 1:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timeout)
    return torch.device("cpu")


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def open_store(facts: LaunchFacts, timeout_s: float, *, serve: bool = False) -> dist.Store:
    """Connect to the run's key-value store (each call makes its own connection); ``serve`` hosts it here.

    The keys of each restart are apart, so that nothing is read from the ranks of an earlier attempt.
    """
    store = dist.TCPStore(
        facts.master_addr,
        facts.master_port,
        is_master=serve,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"dfkd_dist/attempt_{facts.attempt}", store)


def _device(facts: LaunchFacts, device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"device must be auto, cpu or cuda, not {device!r}")
    if device == "cpu" or (device == "auto" and (facts.use_cpu or not torch.cuda.is_available())):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A Slurm task that sees one GPU only sees it as number 0, whatever its local rank.
    index = 0 if count == 1 else facts.local_rank
    if index >= count:
        raise LaunchError(
            f"local rank {facts.local_rank} of {facts.local_world_size} has no GPU: this process sees {count}. Start "
            f"one process for each GPU, or run on the CPU with launch/accelerate/cpu.yaml"
        )
    return torch.device("cuda", index)


def _integer(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name) or default or ""
    if not text.isdecimal():
        raise LaunchError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _node_rank(environ: Mapping[str, str]) -> int:
    if environ.get("GROUP_RANK"):
        return _integer(environ, "GROUP_RANK")
    return _integer(environ, "RANK") // max(1, _integer(environ, "LOCAL_WORLD_SIZE"))


def _parent_argv() -> list[str]:
    import psutil  # comes with accelerate

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _asked_of_accelerate(argv: list[str]) -> str | None:
    """The number of processes that an accelerate command line asks for; None if it is none or does not say."""
    arguments = _launch_arguments(argv)
    if arguments is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(arguments)
    asked = args.num_processes
    if asked is None and (args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu)):
        asked = load_config_from_file(args.config_file).num_processes
    return str(asked) if asked is not None and asked > 0 else None


def _launch_arguments(argv: list[str]) -> list[str] | None:
    """What follows ``accelerate launch``, ``accelerate-launch`` or ``-m accelerate.commands.launch``, else None."""
    names = [os.path.basename(argument) for argument in argv[:4]]
    for i, name in enumerate(names):
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and argv[i + 1 : i + 2] == ["launch"]:
            return argv[i + 2 :]
        installed_as_file = name == "launch.py" and "accelerate" in argv[i]
        if name in ("accelerate-launch", "accelerate.commands.launch") or installed_as_file:
            return argv[i + 1 :]
    return None


def _refusal(asked: str, started: str, count: str) -> str:
    why = (
        "Without several GPUs or MPI, accelerate starts one process and does not say so"
        if started == "1"
        else "The count must be a multiple of --num_machines"
    )
    return (
        f"accelerate launch was {asked}, but WORLD_SIZE here is {started}. {why}. On CPUs these work:\n"
        f"  accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes {count} SCRIPT ARGS\n"
        f"  torchrun --nproc_per_node {count} SCRIPT ARGS"
    )
