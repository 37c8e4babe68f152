"""Images per second from tar shards: our stream beside what people use, and beside the limits of reading and decoding.

    python -m benchmarks.streaming [--quick] [--json FILE]

On the same jpgs at 32, 64 and 224 px, in one run and in turn: our stream, plain webdataset (decoded by torchvision),
torchvision's ImageFolder (PIL), FFCV with jpg and with raw pixels (where it is installed) by its own loader and by our
stream, and two limits: reading the tars without decoding, and libjpeg-turbo decoding of bytes in memory. Every row has
the same number of processes (FFCV's own loader: threads) and ends in uint8 batches; nothing is augmented. The images
are mosaics of real photo crops (64 px, from `data/photos_ood_jpg.npz`) at the size asked for, quality 90: a
photograph's amount of detail in every pixel.

Headline: ours at 224 px as a share of 1 / (1 / reading + 1 / decoding).
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing as mp
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms import functional as TF

from benchmarks.common import arguments, finish, interleaved
from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.archives import Archive
from dfkd_dist.data.shards.manifest import write_manifest
from dfkd_dist.data.shards.tar import Sample, write_shard
from dfkd_dist.data.stream.sets import open_set
from dfkd_dist.data.stream.stream import Stream

BATCH, PROCESSES, SHARDS = 64, 2, 8
SIZES = {32: 24_000, 64: 16_000, 224: 3_000}
"""Pixels to number of images."""


def main() -> None:
    """Make the images, time every reader, print and write the table."""
    given = arguments(__doc__ or "")
    torch.set_num_threads(1)
    sizes = {32: 2_000, 64: 1_000, 224: 400} if given.quick else SIZES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="runs" if Path("runs").is_dir() else None) as work:
        for size, count in sizes.items():
            rows += one_size(Path(work) / str(size), size, count, repeats=1 if given.quick else 5)
    at = {row["reader"]: row["images_per_second"] for row in rows if row["size"] == 224}
    limit = 1 / (1 / at["reading alone"] + 1 / at["decoding alone"])
    value = at["ours"] / limit
    headline = {"name": "ours at 224 px / 1 / (1/read + 1/decode)", "value": value, "unit": "", "aim": 0.9}
    finish("streaming", given, rows, headline, batch=BATCH, processes=PROCESSES, images=sizes)


def one_size(folder: Path, size: int, count: int, repeats: int) -> list[dict[str, Any]]:
    """Images per second of every reader at one size."""
    jpgs = make_jpgs(size, count)
    write_sets(folder, jpgs)
    compiled = ffcv_readers(folder, size)  # first, so that the server of reading processes imports FFCV, once
    acts: dict[str, Callable[[], Any]] = {
        "ours": Ours(folder / "tars", size),
        "webdataset": functools.partial(plain_webdataset, folder),
        "ImageFolder": functools.partial(image_folder, folder),
        "reading alone": InProcesses(read_tars, sorted(map(str, folder.glob("tars/*.tar")))),
        "decoding alone": InProcesses(decode_all, jpgs),
    }
    acts |= compiled
    # Two warm-ups: FFCV compiles its pipeline in the first pass, workers start, files come into the page cache.
    seconds = interleaved(acts, repeats, warmup=2)
    found = {name: count / taken for name, taken in seconds.items()}
    limit = 1 / (1 / found["reading alone"] + 1 / found["decoding alone"])
    return [
        {"size": size, "reader": name, "images_per_second": rate, "share_of_limit": rate / limit}
        for name, rate in found.items()
    ]


# ------------------------------------------------------------------------------------------------------- images


def make_jpgs(size: int, count: int) -> list[bytes]:
    """Mosaics of photo crops, `size` x `size`, as jpg files."""
    crops = _crops()
    random = np.random.default_rng(0)
    tiles = -(-size // 64)
    made = []
    for _ in range(count):
        picked = [crops[i] for i in random.integers(len(crops), size=tiles * tiles)]
        strips = [torch.cat(picked[r * tiles : (r + 1) * tiles], dim=2) for r in range(tiles)]
        whole = torch.cat(strips, dim=1)
        top, left = random.integers(whole.shape[1] - size + 1, size=2)
        made.append(bytes(encode_jpeg(whole[:, top : top + size, left : left + size].contiguous(), 90).numpy()))
    return made


@functools.cache
def _crops() -> list[Tensor]:
    with Archive("data/photos_ood_jpg.npz") as archive:
        data, offsets = archive.read("train_bytes"), archive.read("train_offsets")
    return [decode_jpeg(torch.from_numpy(data[offsets[i] : offsets[i + 1]])) for i in range(2000)]


def write_sets(folder: Path, jpgs: list[bytes]) -> None:
    """The same files as shards with a manifest, and as a folder."""
    (folder / "tars").mkdir(parents=True)
    (folder / "images" / "all").mkdir(parents=True)
    per_shard = -(-len(jpgs) // SHARDS)
    entries = []
    for s in range(SHARDS):
        numbers = range(s * per_shard, min((s + 1) * per_shard, len(jpgs)))
        samples = [Sample(f"{i:08d}", "jpg", jpgs[i]) for i in numbers]
        entries.append(write_shard(folder / "tars" / f"{s:06d}.tar", samples))
        for sample in samples:
            (folder / "images" / "all" / f"{sample.key}.jpg").write_bytes(sample.data)
    write_manifest(folder / "tars", entries, None)


# ------------------------------------------------------------------------------------------------------ readers


class Ours:
    """One epoch of our stream after another, by the same workers: of the tars, or of a compiled file."""

    def __init__(self, where: Path, size: int, kind: Literal["tar", "ffcv"] = "tar") -> None:
        spec = ReaderSpec(shards=str(where), kind=kind, workers=PROCESSES, prefetch=4)
        self.stream = Stream(
            open_set(spec), spec, batch=BATCH, size=size, channels=3, seed=0, rank=0, world_size=1, quarantine=None
        )
        self.epoch = -1

    def __call__(self) -> int:
        """What `get` does, but for one epoch alone: it would read ahead while the others are timed."""
        self.epoch += 1
        s = self.stream
        requests = itertools.islice(s._requests(self.epoch, 0), s.batches)
        return consume(s._locator.raw_batch(*answer).images_NCHW for answer in s._loader.run(requests))


def plain_webdataset(folder: Path) -> int:
    """As its documentation shows, but for torchvision's decoder (faster here than PIL)."""
    urls = sorted(map(str, folder.glob("tars/*.tar")))
    data = wds.WebDataset(urls, shardshuffle=SHARDS, workersplitter=wds.split_by_worker).shuffle(1000).map(_decode)
    loader = DataLoader(data.batched(BATCH, collation_fn=_stack), batch_size=None, num_workers=PROCESSES)
    return consume(loader)


def _decode(sample: dict[str, Any]) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8))


def _stack(images: list[Tensor]) -> Tensor:
    return torch.stack(images)


def image_folder(folder: Path) -> int:
    """torchvision's ImageFolder with PIL, shuffled."""
    data = ImageFolder(str(folder / "images"), transform=TF.pil_to_tensor)
    return consume(x for x, _ in DataLoader(data, BATCH, shuffle=True, num_workers=PROCESSES))


def ffcv_readers(folder: Path, size: int) -> dict[str, Callable[[], Any]]:
    """FFCV with jpg and with raw pixels, by its own loader and by our stream; none where it is not installed."""
    if find_spec("ffcv") is None:
        return {}
    from benchmarks._ffcv import reader
    from dfkd_dist.data.compiled.file import Storing
    from dfkd_dist.data.compiled.write import compile_shards

    acts: dict[str, Callable[[], Any]] = {}
    modes: tuple[Literal["jpg", "raw"], ...] = ("jpg", "raw")
    for mode in modes:
        path = folder / f"ours_{mode}.beton"
        compile_shards(str(folder / "tars"), path, size, 3, Storing(mode))
        acts[f"ours, ffcv ({mode})"] = Ours(path, size, "ffcv")
        acts[f"ffcv ({mode})"] = reader(folder, size, mode, BATCH, PROCESSES)
    return acts


def consume(batches: Iterable[Tensor]) -> int:
    """Take every batch; touches one byte of each image."""
    seen = 0
    for images_NCHW in batches:
        seen += len(images_NCHW)
        images_NCHW[:, 0, 0, 0].sum()
    return seen


# ------------------------------------------------------------------------------------------------------- limits


class InProcesses:
    """`act` on equal shares of the items, one share a process; processes start once and wait between passes."""

    def __init__(self, act: Callable[[list[Any]], None], items: list[Any]) -> None:
        context = mp.get_context("fork")
        self.pipes = []
        for p in range(PROCESSES):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, act, items[p::PROCESSES]), daemon=True).start()
            self.pipes.append(ours)

    def __call__(self) -> None:
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()


def _serve(pipe: Any, act: Callable[[list[Any]], None], items: list[Any]) -> None:
    while pipe.recv():
        act(items)
        pipe.send(True)


def read_tars(paths: list[str]) -> None:
    """Every byte of every tar, in large pieces."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def decode_all(jpgs: list[bytes]) -> None:
    """Every image, one after another."""
    for jpg in jpgs:
        decode_jpeg(torch.frombuffer(bytearray(jpg), dtype=torch.uint8))


if __name__ == "__main__":
    main()
