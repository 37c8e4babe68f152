"""The arguments of `dfkd evaluate`, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MEASURES = ("fid", "per_class", "patches", "balance", "sheet", "tsne", "clusters")
OF_MEASURES = (
    *("real", "pool", "images", "points", "features", "inception", "judge", "beside"),
    *("predicted", "rows", "per_row", "crops", "perplexity", "batch", "seed"),
)
"""What means nothing without a measure."""


def add_parser(commands: Any) -> None:
    """`dfkd evaluate RUN`: accuracies; with measures, those instead."""
    parser = commands.add_parser(
        "evaluate",
        help="accuracy of a run's teachers, ensembles and student; FID, class balance, contact sheets, t-SNE",
        description="Without a measure: accuracy of the run's teachers, ensembles and student. docs/evaluation.md "
        "says what each measure is, and what a SOURCE or a NETWORK may be.",
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", nargs="+", metavar="key=value", default=[], help="an image set; default: the run's")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test", help="of labelled image sets")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and pictures; default: RUN/evaluation")
    _measures(parser.add_argument_group("measures"))
    _images(parser.add_argument_group("of which images"))
    _networks(parser.add_argument_group("by which networks"))
    _details(parser.add_argument_group("details"))
    parser.set_defaults(act=lambda given: evaluate(given, parser))


def _measures(group: Any) -> None:
    group.add_argument("--accuracy", action="store_true", help="accuracies as well")
    group.add_argument("--fid", action="store_true", help="Frechet distance between the pool and the real images")
    group.add_argument("--per-class", action="store_true", help="and between those of each class")
    group.add_argument(
        "--patch", dest="patches", nargs="+", type=_positive, metavar="L", default=[], help="between L x L patches"
    )
    group.add_argument("--balance", action="store_true", help="the pool's images by predicted class (balance.png)")
    group.add_argument("--sheet", action="store_true", help="contact sheet of the pool by predicted class (sheet.png)")
    group.add_argument("--tsne", action="store_true", help="map of real, selected and unselected features (tsne.png)")
    group.add_argument("--clusters", action="store_true", help="map of student features by label (clusters.png)")


def _images(group: Any) -> None:
    group.add_argument("--real", nargs="+", metavar="SOURCE", default=["data"], help="real images; default: --data's")
    group.add_argument("--pool", nargs="+", metavar="SOURCE", default=[], help="default: what the student learned from")
    group.add_argument("--images", type=_positive, metavar="N", help="at most N of each, chosen by --seed")
    group.add_argument("--points", type=_positive, metavar="N", default=1000, help="images of each group in a map")


def _networks(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--features", metavar="NETWORK", help="a teacher, student, or a weights file; default: the first"
    )
    which.add_argument("--inception", type=Path, metavar="FILE", help="Inception-v3's features; a local weights file")
    group.add_argument("--judge", metavar="NETWORK", help="who names an image's class; default: all teachers")
    group.add_argument("--beside", metavar="NETWORK", help="a second network for --clusters, or another run")


def _details(group: Any) -> None:
    group.add_argument(
        "--predicted", action="store_true", help="--per-class: ask the judge even where labels are known"
    )
    group.add_argument("--rows", nargs="+", metavar="CLASS", default=[], help="--sheet: classes; default: all")
    group.add_argument("--per-row", type=_positive, metavar="N", default=10, help="--sheet: images of a class")
    group.add_argument("--crops", type=_positive, metavar="N", default=1, help="--patch: patches of each image")
    group.add_argument("--perplexity", type=float, default=30.0, help="of t-SNE")
    group.add_argument("--batch", type=_positive, metavar="N", default=256, help="images at a time")
    group.add_argument("--seed", type=int, default=0, help="of what is chosen at random")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value


def evaluate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and print."""
    if not any(getattr(given, name) for name in MEASURES):
        idle = [name for name in OF_MEASURES if getattr(given, name) != parser.get_default(name)]
        if idle:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            parser.error(f"{options}: of no use without a measure such as --fid or --balance")
        return _accuracies(given)
    from dfkd_dist.engine.look.measures import Wanted
    from dfkd_dist.engine.look.results import lines
    from dfkd_dist.engine.look.runs import measure_run

    values: dict[str, Any] = {}
    for name in Wanted.__dataclass_fields__:
        value = getattr(given, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    wanted = Wanted(**values)
    found = measure_run(
        given.run,
        wanted,
        data=given.data,
        split=given.split,
        device=given.device,
        out=given.out,
        accuracy=given.accuracy,
    )
    _print_accuracies(found.get("accuracy", {}))
    for line in lines(found):
        print(line)
    return 0


def _accuracies(given: argparse.Namespace) -> int:
    from dfkd_dist.engine.finished import evaluate_run

    found = dict(evaluate_run(given.run, given.data, given.split, given.device))
    if given.out is not None:
        from dfkd_dist.engine.look.results import write_results

        write_results(given.out, {"accuracy": found})
    _print_accuracies(found)
    return 0


def _print_accuracies(found: dict[str, float]) -> None:
    for name, value in found.items():
        print(f"{name:32s} {value:7.2f}")
