"""`dfkd shards build | verify | info | compile`: sets of WebDataset shards, and FFCV files of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfkd_dist.data.compiled.about import Compiled
    from dfkd_dist.data.compiled.file import Storing

FOUND = 1
"""The exit code of `verify` when something is wrong."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of `dfkd`."""
    shards = commands.add_parser("shards", help="sets of WebDataset shards: build, verify, look at, compile")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    _add_build(actions.add_parser("build", help="shards out of a folder, .npz, torchvision set, list or tars"))
    verify = actions.add_parser("verify", help="find missing or damaged shards and images that cannot be decoded")
    verify.add_argument("shards", help="the folder or URL of a set, or its manifest")
    verify.add_argument("--clean", type=Path, metavar="OUT", help="write a copy without what is wrong")
    verify.add_argument("--no-decode", dest="decode", action="store_false", help="compare check sums only")
    verify.add_argument("--json", type=Path, metavar="FILE", help="also write all findings to this file")
    verify.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each core, at most 8")
    verify.set_defaults(act=_verify)
    info = actions.add_parser("info", help="what a set holds, and a contact sheet")
    info.add_argument("shards", help="the folder or URL of a set, or its manifest")
    info.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a sheet of images")
    info.add_argument("--images", type=int, default=64, help="images on the sheet")
    info.add_argument("--side", type=int, default=64, help="side of an image on the sheet, in pixels")
    info.add_argument("--seed", type=int, help="choose the sheet's images at random; default: spread evenly")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(act=_info)
    _add_compile(actions.add_parser("compile", help="one FFCV file of a set, a selection or an image set"))


def _add_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("input", help="a folder, .npz, .csv, .tsv, .parquet, .txt, tars (folder, pattern, URL) or a set")
    build.add_argument("out", type=Path, help="the folder of the new set; the same command goes on with a killed build")
    source = build.add_argument_group("the input")
    source.add_argument("--kind", help="folder, npz, torchvision, list, tar or shards; default: by its looks")
    source.add_argument("--name", help="torchvision: which set (INPUT is then its root)")
    source.add_argument("--split", choices=["train", "val", "test"], help="folder, npz, torchvision: which part")
    source.add_argument("--root", help="list: where its paths begin; default: the list's folder")
    source.add_argument("--path-column", help="list: default path, file, filename, image or url")
    source.add_argument("--label-column", help="list: default label, class or target")
    source.add_argument("--classes", metavar="FILE", help="list, tar: class names, one a line or a JSON list")
    source.add_argument("--unlabelled", dest="labels", action="store_false", help="leave the labels out")
    images = build.add_argument_group("the images")
    images.add_argument("--size", type=int, help="make every image a square of this side; default: keep as they are")
    images.add_argument("--format", choices=["auto", "jpg", "png"], default="auto", help="auto keeps files' own bytes")
    images.add_argument("--quality", type=int, default=95, help="of jpg; default 95")
    images.add_argument("--on-bad", choices=["stop", "skip"], default="stop", help="at an image that cannot be stored")
    dealing = build.add_argument_group("the shards")
    dealing.add_argument("--maxcount", type=int, default=1000, help="images in a shard, at most; default 1000")
    dealing.add_argument("--maxsize", type=float, default=256, metavar="MB", help="aim of a shard's size; default 256")
    dealing.add_argument("--shuffle", type=int, metavar="SEED", help="mix the images first; for sorted inputs")
    dealing.add_argument("--limit", type=int, metavar="N", help="only the first N images (after mixing)")
    dealing.add_argument("--index-only", action="store_true", help="tars: write a manifest, leave them where they are")
    build.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each core, at most 8")
    build.add_argument("--overwrite", action="store_true", help="replace an earlier build in OUT")
    build.set_defaults(act=_build)


def _add_compile(compile: argparse.ArgumentParser) -> None:
    compile.add_argument("shards", nargs="?", help="the folder or URL of a set, or its manifest; or give --data")
    compile.add_argument("out", type=Path, help="the file to write, NAME.beton; NAME.beton.json says what it is")
    what = compile.add_argument_group("what is compiled")
    what.add_argument("--selection", metavar="FILE", help="only what this file of `dfkd select` names")
    what.add_argument("--size", type=int, help="side of the square images, in pixels")
    what.add_argument("--channels", type=int, choices=[1, 3], help="default 3")
    what.add_argument("--bad-limit", type=float, default=0.01, metavar="SHARE", help="of undecodable images, at most")
    what.add_argument("--data", nargs="+", metavar="key=value", default=[], help="a labelled image set (kind=...)")
    what.add_argument("--split", choices=["train", "val", "test"], default="test", help="of --data; default test")
    storing = compile.add_argument_group("how images are stored")
    storing.add_argument("--mode", choices=["raw", "jpg", "proportion"], default="raw", help="raw keeps every pixel")
    storing.add_argument("--quality", type=int, default=90, help="of jpg; default 90")
    storing.add_argument("--share", type=float, default=0.5, help="proportion: how many become jpg; default 0.5")
    compile.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each core, at most 8")
    compile.add_argument("--overwrite", action="store_true", help="replace OUT")
    compile.set_defaults(act=_compile)


def _build(given: argparse.Namespace) -> int:
    from dfkd_dist.data.shards.sources import read_class_names

    classes = None if given.classes is None else read_class_names(given.classes)
    manifest = _indexed(given, classes) if given.index_only else _built(given, classes)
    print(f"{manifest}: {given.out}")
    return 0


def _built(given: argparse.Namespace, classes: list[str] | None) -> str:
    from dfkd_dist.data.shards.build import BuildOptions, build
    from dfkd_dist.data.shards.encode import Encoding
    from dfkd_dist.data.shards.sources import SourceOptions, open_input

    options = BuildOptions(
        encoding=Encoding(given.size, given.format, given.quality),
        maxcount=given.maxcount,
        maxsize_mb=given.maxsize,
        shuffle=given.shuffle,
        limit=given.limit,
        on_bad=given.on_bad,
        labels=given.labels,
    )
    reading = SourceOptions(given.name, given.split, given.root, given.path_column, given.label_column, classes)
    source = open_input(given.input, given.kind, reading)
    made = build(source, given.out, options, workers=_workers(given), overwrite=given.overwrite, progress=True)
    return f"{len(made):,} images in {len(made.shards):,} shards"


def _indexed(given: argparse.Namespace, classes: list[str] | None) -> str:
    from dfkd_dist.data.shards.index_in_place import index_in_place

    spare = {
        "size": None,
        "format": "auto",
        "shuffle": None,
        "limit": None,
        "labels": True,
        "name": None,
        "split": None,
    }
    wrong = [name for name, default in spare.items() if getattr(given, name) != default]
    if wrong or given.kind not in (None, "tar"):
        raise ValueError(f"--index-only leaves tars as they are; drop {wrong or ['--kind']}")
    made = index_in_place(
        given.input, given.out, classes, workers=_workers(given), overwrite=given.overwrite, progress=True
    )
    return f"{len(made):,} images in {len(made.shards):,} tars"


def _verify(given: argparse.Namespace) -> int:
    from dfkd_dist.data.shards.clean import write_clean
    from dfkd_dist.data.shards.verify import verify

    workers = _workers(given)
    report = verify(given.shards, workers=workers, decode=given.decode, progress=True)
    print(report.table())
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if given.clean is not None:
        made = write_clean(given.shards, report, given.clean, decode=given.decode, workers=workers, progress=True)
        print(f"{len(made):,} images in {len(made.shards):,} shards: {given.clean}")
    return FOUND if report.findings else 0


def _info(given: argparse.Namespace) -> int:
    from dfkd_dist.data.shards.info import info, sheet

    found = info(given.shards)
    print(json.dumps(asdict(found), indent=1) if given.json else found.table())
    if given.sheet is not None:
        sheet(given.shards, given.sheet, images=given.images, side=given.side, seed=given.seed)
    return 0


def _compile(given: argparse.Namespace) -> int:
    if (given.shards is None) == (not given.data):
        raise ValueError("give either a set of shards or --data")
    made = _compiled_images(given) if given.data else _compiled_shards(given)
    about = made.about
    left = f", {len(about.bad):,} could not be decoded" if about.bad else ""
    print(f"{about.count:,} images of {about.size} px, {about.bytes / 1e6:,.1f} MB{left}: {made.path}")
    return 0


def _compiled_shards(given: argparse.Namespace) -> Compiled:
    from dfkd_dist.data.compiled.write import compile_shards

    if given.size is None or given.size < 1:
        raise ValueError(f"--size: found {given.size}, allowed are 1 and more; compiled images have one size")
    return compile_shards(
        given.shards,
        given.out,
        given.size,
        given.channels or 3,
        _storing(given),
        selection=given.selection,
        workers=_workers(given),
        bad_limit=given.bad_limit,
        overwrite=given.overwrite,
        progress=True,
    )


def _compiled_images(given: argparse.Namespace) -> Compiled:
    from dfkd_dist.config import DatasetSpec, apply_override, parse
    from dfkd_dist.data.compiled.write import compile_images
    from dfkd_dist.data.datasets import load_image_set

    if given.size is not None or given.channels is not None or given.selection is not None:
        raise ValueError("--size, --channels and --selection are of shards; --data has size=... and channels=...")
    tree: dict[str, Any] = {}
    for override in given.data:
        apply_override(tree, override)
    images = load_image_set(parse(DatasetSpec, tree, where="--data"), given.split)
    return compile_images(
        images,
        " ".join(given.data),
        given.split,
        given.out,
        _storing(given),
        workers=_workers(given),
        overwrite=given.overwrite,
        progress=True,
    )


def _storing(given: argparse.Namespace) -> Storing:
    from dfkd_dist.data.compiled.file import Storing

    return Storing(given.mode, given.quality, given.share)


def _workers(given: argparse.Namespace) -> int:
    from dfkd_dist.data.shards.workers import default_workers

    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers: found {given.workers}, allowed are 1 and more")
    return given.workers or default_workers()
