"""Writing compiled files: a set of shards, a selection of it, or a labelled image set, as one FFCV file.

What is decoded is what the tars' reader decodes; it is stored as raw pixels, or as jpg. FFCV's own writer hands samples
to processes of its own and waits for ever for one that dies, and where their pages land depends on who is fastest. Here
other processes decode, threads encode, and this process alone puts images into FFCV's pages in the order of ids: so
the same input makes the same bytes (jpg: with the same version of OpenCV).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled.about import SUFFIX, About, Compiled, LeftOut, about_path, read_compiled
from dfkd_dist.data.compiled.extra import need_ffcv
from dfkd_dist.data.compiled.file import File, Storing, encoder
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import ImageSet
from dfkd_dist.data.part import Split
from dfkd_dist.data.selection import read_selection
from dfkd_dist.data.shards.files import sha256_of
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.scan import Chunk, chunks_of, scan

_AT_ONCE = 64


class _Images(NamedTuple):
    """Some images on their way into the file, and samples that could not be decoded."""

    ids_n: NDArray[np.int64]
    labels_n: NDArray[np.int64]
    images_nCHW: Tensor
    bad: list[LeftOut]


@dataclass(frozen=True)
class _Input:
    """What is compiled: the parts of `About` that are known beforehand, and the images in the order of ids."""

    about: dict[str, Any]
    asked: int
    images: Callable[[], Iterator[_Images]]


def compile_shards(
    where: str,
    out: Path,
    size: int,
    channels: int,
    storing: Storing | None = None,
    *,
    selection: str | None = None,
    workers: int = 1,
    bad_limit: float = 0.01,
    overwrite: bool = False,
    progress: bool = False,
) -> Compiled:
    """Compile a set of shards, or what a selection chose of it.

    Args:
        where: the folder or URL of the set, or its manifest.
        out: the file to write, `NAME.beton`; its JSON lies beside it.
        size: side of the square images in pixels.
        channels: 1 or 3.
        storing: how; None stores raw pixels.
        selection: a file that `dfkd select` wrote.
        workers: processes that decode, and threads that encode.
        bad_limit: a larger share of images that cannot be decoded is an error.
        overwrite: `out` may exist.
        progress: show a bar.

    Raises:
        DatasetError: the set or the selection cannot be read, nothing is left, or the file cannot be written.
        ImportError: FFCV is missing; says how to get it.
    """
    manifest = read_manifest(where)
    chosen_N = None if selection is None else read_selection(selection, manifest).chosen_N
    reader = ReaderSpec(shards=manifest.path, workers=workers if workers > 1 else 0, bad_limit=bad_limit)
    about = {
        "source": manifest.path,
        "set": manifest.digest,
        "selection": None if chosen_N is None else hashlib.sha256(np.packbits(chosen_N).tobytes()).hexdigest(),
        "samples": len(manifest),
        "split": None,
        "classes": None if manifest.classes is None else list(manifest.classes),
        "shards": [(shard.name, shard.count) for shard in manifest.shards],
    }
    asked = len(manifest) if chosen_N is None else int(chosen_N.sum())

    def images() -> Iterator[_Images]:
        return _of_shards(manifest, chosen_N, reader, size, channels)

    return _compile(_Input(about, asked, images), out, size, channels, storing, workers, overwrite, progress)


def _of_shards(
    manifest: Manifest, chosen_N: NDArray[np.bool_] | None, reader: ReaderSpec, size: int, channels: int
) -> Iterator[_Images]:
    def places(chunk: Chunk) -> NDArray[np.int64]:
        if chosen_N is None:
            return np.arange(chunk.count, dtype=np.int64)
        return np.flatnonzero(chosen_N[chunk.start : chunk.start + chunk.count])

    chunks = [chunk for chunk in chunks_of(manifest, _AT_ONCE) if len(places(chunk))]
    for raw in scan(manifest, reader, batch=_AT_ONCE, size=size, channels=channels, chunks=chunks, places=places):
        bad = [LeftOut(b.id, int(manifest.labels_N[b.id]), b.cause, b.detail) for b in raw.bad]
        keep_n = raw.valid_N
        yield _Images(raw.ids_N[keep_n].numpy(), raw.labels_N[keep_n].numpy(), raw.images_NCHW[keep_n], bad)


def compile_images(
    images: ImageSet,
    source: str,
    split: Split,
    out: Path,
    storing: Storing | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Compiled:
    """Compile a labelled image set, for example one for evaluation; a sample's id is its place in the set.

    Args:
        images: the set.
        source: what it is, for people.
        split: which split it is.
        out: as of `compile_shards`, and all below.
        storing: how.
        workers: threads that encode.
        overwrite: `out` may exist.
        progress: show a bar.

    Raises:
        DatasetError: pixels have labels; the set is empty; an image cannot be read; the file cannot be written.
        ImportError: FFCV is missing; says how to get it.
    """
    if images.of_pixels:
        raise DatasetError(f"{source}: its pixels have labels; allowed: sets with one label for an image")
    about = {
        "source": source,
        "set": None,
        "selection": None,
        "samples": len(images),
        "split": split,
        "classes": images.classes,
        "shards": [(split, len(images))],
    }

    def parts() -> Iterator[_Images]:
        for start in range(0, len(images), _AT_ONCE):
            places_n = torch.arange(start, min(start + _AT_ONCE, len(images)))
            yield _Images(places_n.numpy(), images.labels(places_n).numpy(), images.images(places_n), [])

    given = _Input(about, len(images), parts)
    return _compile(given, out, images.size, images.channels, storing, workers, overwrite, progress)


def _compile(
    given: _Input,
    out: Path,
    size: int,
    channels: int,
    storing: Storing | None,
    workers: int,
    overwrite: bool,
    progress: bool,
) -> Compiled:
    storing = storing or Storing()
    if out.suffix != SUFFIX:
        raise DatasetError(f"{out}: allowed is a name that ends in {SUFFIX}")
    if out.exists() and not overwrite:
        raise DatasetError(f"{out} exists; give --overwrite, or another name")
    if given.asked == 0:
        raise DatasetError(f"{given.about['source']}: nothing to compile")
    need_ffcv("dfkd shards compile")
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        count, bad = _write(given, aside, size, storing, workers, progress)
        about = About(
            **given.about,
            count=count,
            size=size,
            channels=channels,
            mode=storing.mode,
            bytes=aside.stat().st_size,
            sha256=sha256_of(aside),
            bad=bad,
        )
        _put(aside, out, about)
    except OSError as error:
        raise DatasetError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return read_compiled(out)


def _put(aside: Path, out: Path, about: About) -> None:
    """The JSON goes first and comes last: a file without one is not read."""
    described = about_path(out)
    described.unlink(missing_ok=True)
    aside.replace(out)
    half = described.with_name(f".{described.name}.{os.getpid()}.part")
    try:
        half.write_text(about.text(), encoding="utf-8")
        half.replace(described)
    finally:
        half.unlink(missing_ok=True)


def _write(
    given: _Input, path: Path, size: int, storing: Storing, workers: int, progress: bool
) -> tuple[int, list[LeftOut]]:
    """The file itself; how many images it has, and which could not be decoded."""
    bad: list[LeftOut] = []
    file = File(path, given.asked, size)
    encode = encoder(storing, int(given.about["samples"]))
    with ThreadPoolExecutor(workers) as pool, tqdm(total=given.asked, unit="image", disable=not progress) as bar:
        with file:
            for part in given.images():
                images_nHWC = part.images_nCHW.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
                encoded = pool.map(encode, part.ids_n.tolist(), images_nHWC)
                for sample, label, stored in zip(part.ids_n, part.labels_n, encoded, strict=True):
                    file.add(int(sample), int(label), stored)
                bad += part.bad
                bar.update(len(part.ids_n) + len(part.bad))
    if file.count == 0:
        raise DatasetError(f"{given.about['source']}: not one of {given.asked} images can be decoded")
    file.finish()
    return file.count, bad
