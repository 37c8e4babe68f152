"""What launchers and `dfkd train` start: arguments in, exit code out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from dfkd_dist.config import Recipe, load_recipe
from dfkd_dist.engine import report
from dfkd_dist.engine.checkpoint import CheckpointError
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_probe import measured_rate
from dfkd_dist.engine.run import run
from dfkd_dist.engine.rundir import check_run
from dfkd_dist.parallel.launch import LaunchFacts, launch_facts, refuse_silent_single

log = logging.getLogger(__name__)

EXIT_REFUSED = 2
"""The recipe, a file or a directory was refused before any work."""
EXTRA = "dfkd-dist["
"""Stands in the message of an ImportError that names the extra to install."""
EXIT_FAILED = 1
"""A checkpoint could not be written or none could be read; earlier ones are untouched."""


def main(argv: Sequence[str] | None = None) -> int:
    """`train RECIPE [key=value ...] [--resume | --overwrite]`: what launchers and `dfkd train` start."""
    parser = argparse.ArgumentParser(prog="dfkd train", description="Train a student as a recipe says.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as debug/dfmf.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, read as YAML")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    which.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same directory")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--no-estimate", dest="estimate", action="store_false", help="start without an estimate of time and memory"
    )
    given = parser.parse_intermixed_args(argv)  # overrides may stand behind the options
    refuse_silent_single()
    facts = launch_facts()
    logging.basicConfig(
        level=logging.INFO if facts.rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {facts.rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    recipe = load_recipe(given.recipe, given.overrides)
    # On every rank, so that nobody waits for a rank that was refused; it only reads.
    check_run(recipe, resume=given.resume, overwrite=given.overwrite)
    if facts.rank == 0 and given.estimate:
        _tell_estimate(recipe, facts, given.device)
    code, summary = run(recipe, facts, resume=given.resume, overwrite=given.overwrite, device=given.device)
    if summary is not None and facts.rank == 0:
        print(report.summary_table(summary))
    return code


def _tell_estimate(recipe: Recipe, facts: LaunchFacts, device: str) -> None:
    try:
        log.info("%s", estimate(recipe, facts, device))
    except ValueError as error:  # the run itself will refuse it, and name the key: it looks at the real files
        log.debug("no estimate: %s", error)
    except (RuntimeError, NotImplementedError) as error:  # an operator that cannot be run without data
        log.warning("no estimate of time and memory: %s", error)


def estimate(recipe: Recipe, facts: LaunchFacts, device: str) -> str:
    """One line on what is about to happen: mesh, peak memory of a rank, time; from a dry run and a short real probe.

    The time is that of the arithmetic alone, at this process's speed with the machine to itself.
    """
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    found = plan(recipe, facts.world_size, measured_rate(recipe, place))
    seconds = sum(found.seconds[kind] * rounds for kind, rounds in found.rounds.items())
    peak = max(role.memory.peak for role in found.roles)
    mesh = f"{len(found.rows)} x {found.columns} ranks"
    return f"{recipe.name}: {mesh}, about {peak / 2**20:,.0f} MiB of tensors per rank and {report.duration(seconds)}"


def command(act: Callable[[], int]) -> int:
    """Run a command; refusals become one message on stderr and EXIT_REFUSED, not a traceback."""
    try:
        return act()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except ImportError as error:
        if EXTRA not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
