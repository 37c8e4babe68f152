"""The arguments of `dfkd synthesize`, and what it prints."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """`dfkd synthesize RECIPE --out FOLDER`; under torchrun or accelerate it shares the work over the ranks."""
    parser = commands.add_parser(
        "synthesize",
        help="make a recipe's images once, as a set of shards with soft targets, without a student",
        description="Runs all rounds of source.kind: inversion without student steps and writes the images as shards "
        "into FOLDER, with labels, a manifest, and every teacher's logits in targets.safetensors. FOLDER/run keeps the "
        "recipe, the metrics and a contact sheet. Under torchrun or accelerate launch the ranks share the work.",
    )
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the set of shards")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    which.add_argument("--overwrite", action="store_true", help="delete what the same recipe made there before")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(act=synthesize)


def synthesize(given: argparse.Namespace) -> int:
    """Make the pool and say what is in it; the exit code."""
    from dfkd_dist.config import load_recipe
    from dfkd_dist.engine.synthesize import synthesize as make
    from dfkd_dist.parallel.launch import launch_facts, refuse_silent_single

    refuse_silent_single()
    facts = launch_facts()
    if facts.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    recipe = load_recipe(given.recipe, given.overrides)
    restart = {"resume": given.resume, "overwrite": given.overwrite}
    code, summary = make(recipe, given.out, facts, device=given.device, **restart)
    if summary is not None and facts.rank == 0:
        balance = summary["balance"]
        print(f"{summary['images']:,} images: {given.out}")
        print(f"the teachers see the label that was wanted in {summary['agreement']:.2f} % of them")
        print(f"evenness of the classes {balance['evenness']:.3f}, {balance['missing_classes']} without an image")
    return code
