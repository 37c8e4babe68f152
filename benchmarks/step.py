"""A whole DFMF round and its phases, ours on 1, 2 and 4 ranks beside a plain implementation, in one run.

    python -m benchmarks.step [--quick] [--json FILE] [--device cuda]

Headline: seconds of a plain round / seconds of ours (bf16) on one rank. Both make the same number of steps on the same
number of images with the same networks. The rows for several ranks share this machine's cores, so on a small CPU they
show the cost of being distributed, not a speed-up.
"""

from __future__ import annotations

import socket
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.common import arguments, finish, interleaved
from benchmarks.plain import PlainDFMF
from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine.build import Build, build
from dfkd_dist.parallel.launch import join_at, leave

PHASES = ("generator", "assistant", "exchange", "student")


def recipe(quick: bool, precision: str, rounds: int) -> Recipe:
    """DFMF with two ResNet-18 at 32 px; smaller batch and fewer steps than the paper's, in its proportion 1:2."""
    arch, batch = ("resnet8", 16) if quick else ("resnet18", 32)
    teachers = [{"name": f"t{k}", "weights": "random", "arch": arch} for k in range(2)]
    tree: dict[str, Any] = {
        "name": "step",
        "method": "DFMF",
        "image": {"size": 32, "channels": 3},
        "num_classes": 10,
        "batch": batch,
        "rounds": {"warmup": 0, "main": rounds, "student_steps": 2},
        "teachers": teachers,
        "student": {"arch": arch},
        "objective": {"kl": 1.0, "vid": 1.0},
        "source": {
            "kind": "generative",
            "loss": {"bn": 0.1, "ice": 0.1, "bce": 0.1, "adv": 1.0},
            "adversary": {"against": "assistant"},
            "assistant": {"steps": 1},
        },
        "precision": {"train": precision, "teacher": precision, "tf32": True},
        "log": {"every": 1000000},
    }
    return parse(Recipe, tree)


class Ours:
    """One build, advanced round by round."""

    def __init__(self, spec: Recipe, device: torch.device, world: int = 1) -> None:
        self.built: Build = build(spec, device, world)
        self.seconds = self.built.trainer.meters.seconds

    def round(self) -> None:
        """One main round of the real training loop."""
        trainer = self.built.trainer
        trainer.rounds = trainer.position.round + 1
        trainer.fit()


class Phased:
    """Keeps each round's time by phase, for medians.

    Args:
        one: a `PlainDFMF` or `Ours`: advances by `round()`, adds up `seconds` by phase.
    """

    def __init__(self, one: Any) -> None:
        self.one = one
        self.rounds: list[dict[str, float]] = []

    def round(self) -> None:
        """One round."""
        before = dict(self.one.seconds)
        self.one.round()
        self.rounds.append({phase: self.one.seconds[phase] - before.get(phase, 0.0) for phase in PHASES})

    def phases(self) -> dict[str, float]:
        """Median milliseconds of each phase in a round, the first (which warms up) left out."""
        return {phase: 1000 * median(r[phase] for r in self.rounds[1:]) for phase in PHASES}


def _rank(rank: int, size: int, port: int, quick: bool, precision: str, repeats: int, out: Any) -> None:
    torch.set_num_threads(1)
    join_at(rank, size, port)
    ours = Phased(Ours(recipe(quick, precision, repeats + 1), torch.device("cpu"), size))
    seconds = interleaved({"round": ours.round}, repeats)
    if rank == 0:
        out.put((seconds["round"], ours.phases()))
    leave()


def several_ranks(size: int, quick: bool, precision: str, repeats: int) -> dict[str, Any]:
    """Ours on gloo ranks of this machine, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    arguments_of = [(r, size, port, quick, precision, repeats, out) for r in range(size)]
    ranks = [context.Process(target=_rank, args=args) for args in arguments_of]
    for rank in ranks:
        rank.start()
    seconds, phases = out.get(timeout=600)
    for rank in ranks:
        rank.join()
    return {"implementation": "ours", "precision": precision, "ranks": size, "round_ms": 1000 * seconds} | phases


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__ or "")
    device = torch.device(given.device)
    repeats = 3 if given.quick else 7
    # One thread a rank in every row: barriers between threads that share busy cores would measure the neighbours.
    torch.set_num_threads(1)
    spec = recipe(given.quick, "fp32", 1)
    if device.type == "cuda":
        torch.set_default_device(device)
    plain = Phased(PlainDFMF(spec))
    torch.set_default_device("cpu")
    ours = {p: Phased(Ours(recipe(given.quick, p, 1), device)) for p in ("fp32", "bf16")}
    acts = {"plain": plain.round} | {p: one.round for p, one in ours.items()}
    if device.type == "cuda":
        acts["plain"] = lambda: _on(device, plain.round)
    seconds = interleaved(acts, repeats)
    first = {"implementation": "plain", "precision": "fp32", "ranks": 1, "round_ms": 1000 * seconds["plain"]}
    rows: list[dict[str, Any]] = [first | plain.phases()]
    for precision, one in ours.items():
        row = {"implementation": "ours", "precision": precision, "ranks": 1, "round_ms": 1000 * seconds[precision]}
        rows.append(row | one.phases() | {"plain/ours": seconds["plain"] / seconds[precision]})
    if device.type == "cpu":
        rows += [several_ranks(size, given.quick, "fp32", repeats) for size in (2, 4)]
    headline = {
        "name": "plain / ours (bf16), whole DFMF round on one rank",
        "value": seconds["plain"] / seconds["bf16"],
        "unit": "x",
        "aim": 2.0,
    }
    finish("step", given, rows, headline, recipe=spec.model_dump())


def _on(device: torch.device, act: Any) -> None:
    with torch.device(device):
        act()


if __name__ == "__main__":
    main()
