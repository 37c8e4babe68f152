"""The `dfkd` command. Each subcommand parses its arguments and calls one function of the engine."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dfkd_dist import cli_evaluate, cli_select, cli_shards, cli_synthesize


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        from dfkd_dist.engine import entry

        return entry.command(lambda: entry.main(arguments[1:]))
    given = _parsed(arguments)
    from dfkd_dist.engine.entry import command

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return command(lambda: given.act(given))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Overrides may also stand behind the options, where argparse alone would not find them."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(given, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        given.overrides = [*given.overrides, *rest]
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfkd", description="dfkd: distil several trained networks into one, without their training data."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe in this process (see also launch/train.py)")
    _recipe_arguments(train)

    config = commands.add_parser("config", help="print a resolved recipe")
    _recipe_arguments(config)
    config.set_defaults(act=_config)

    plan = commands.add_parser("plan", help="mesh, memory and bytes of a recipe on N ranks, without running it")
    _recipe_arguments(plan)
    plan.add_argument("--ranks", type=int, default=1)
    plan.add_argument("--time", action="store_true", help="also estimate time, by a few real steps on this machine")
    plan.add_argument("--json", type=Path, help="also write the plan to this file")
    plan.set_defaults(act=_plan)

    teachers = commands.add_parser("teachers", help="private teachers").add_subparsers(required=True, metavar="ACTION")
    teach = teachers.add_parser("train", help="train private teachers on shares of a labelled set")
    _recipe_arguments(teach)
    _restart_arguments(teach)
    teach.set_defaults(act=_train_teachers)

    cli_evaluate.add_parser(commands)
    cli_shards.add_parser(commands)
    cli_select.add_parser(commands)
    cli_synthesize.add_parser(commands)

    export = commands.add_parser("export", help="the student as safetensors with its card, and as ONNX")
    export.add_argument("run", type=Path)
    export.add_argument("--out", type=Path, help="target without suffix; default: RUN/export/student")
    export.add_argument("--onnx", action="store_true")
    export.set_defaults(act=_export)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def _restart_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="keep what is finished and go on")
    which.add_argument("--overwrite", action="store_true", help="start again")


def _config(given: argparse.Namespace) -> int:
    from dfkd_dist.config import dump, find_recipe, load_recipe, load_teachers_recipe, read_yaml

    tree = read_yaml(find_recipe(given.recipe))
    load = load_teachers_recipe if "archs" in tree else load_recipe
    print(dump(load(given.recipe, given.overrides)), end="")
    return 0


def _plan(given: argparse.Namespace) -> int:
    import torch

    from dfkd_dist.config import load_recipe
    from dfkd_dist.engine.plan import plan
    from dfkd_dist.engine.plan_probe import measured_rate

    recipe = load_recipe(given.recipe, given.overrides)
    rate = measured_rate(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu")) if given.time else None
    found = plan(recipe, given.ranks, rate)
    print(found.table())
    if given.json is not None:
        given.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return 0


def _train_teachers(given: argparse.Namespace) -> int:
    from dfkd_dist.config import load_teachers_recipe
    from dfkd_dist.engine.private_teachers import Unfinished, train_teachers

    recipe = load_teachers_recipe(given.recipe, given.overrides)
    try:
        results = train_teachers(recipe, resume=given.resume, overwrite=given.overwrite)
    except Unfinished as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    for one in results:
        frequent = f", {one['frequent_accuracy']:.2f}% on its frequent classes" if one["frequent_accuracy"] else ""
        overlap = f", mIoU {one['miou']:.2f}%" if "miou" in one else ""
        print(f"{one['name']}: {one['accuracy']:.2f}%{overlap}{frequent} ({one['images']} images) -> {one['file']}")
    return 0


def _export(given: argparse.Namespace) -> int:
    from dfkd_dist.engine.finished import export_run

    for path in export_run(given.run, given.out, onnx=given.onnx):
        print(path)
    return 0
