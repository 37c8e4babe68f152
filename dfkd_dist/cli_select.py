"""The arguments of `dfkd select`, and what it prints."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """`dfkd select RECIPE --out FILE`; under torchrun or accelerate it shares the work over the ranks."""
    parser = commands.add_parser(
        "select",
        help="choose images of a shard set by what a recipe's teachers say; the stream then follows the file",
        description="Shows every image of source.reader to the teachers and writes which ones source.selection takes "
        "(kind: top or random). Under torchrun or accelerate launch the ranks share the work; the file is the same.",
    )
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the selection, JSON lines")
    parser.add_argument("--compact", type=Path, metavar="FOLDER", help="also write the chosen images as shards there")
    parser.add_argument("--overwrite", action="store_true", help="FILE may exist")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(act=select)


def select(given: argparse.Namespace) -> int:
    """Choose, write, and print a table on the first rank; the exit code."""
    from dfkd_dist.config import load_recipe
    from dfkd_dist.engine.select import select as run
    from dfkd_dist.parallel.launch import launch_facts, refuse_silent_single

    refuse_silent_single()
    facts = launch_facts()
    if facts.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    recipe = load_recipe(given.recipe, given.overrides)
    code, tally = run(recipe, given.out, facts, into=given.compact, overwrite=given.overwrite, device=given.device)
    if tally is not None and facts.rank == 0:
        print(tally.table())
    return code
