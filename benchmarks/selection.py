"""Choosing images for a student from 600,000, on 4 gloo ranks: throughput beside its limits, and memory at two sizes.

    python -m benchmarks.selection [--quick] [--json FILE]

The images are 32 px jpgs: crops, resized and flipped, of the photos, Tiny-ImageNet and CIFAR-10 images in `data/`; they
are made once, under `runs/benchmark/selection/`. The teacher is a LeNet-5 with fresh weights: what it says does not
matter here, and one that costs little leaves the least room for everything else. Its answers are kept on disk as in a
run, but begin empty each time. (`--quick`: 4,000 images on 2 ranks.)

Each rank has one thread, decodes its own images and shares this machine's cores with the others. In the same processes
and in turn: selecting, decoding alone, and the teacher alone on images in memory.

Headline: selecting at the larger size as a share of 1 / (1 / decoding + 1 / teacher). Memory is the anonymous memory of
a rank (/proc/self/smaps_rollup) at its peak while selecting; 24 bytes a sample of it are the manifest's numbers.
"""

from __future__ import annotations

import functools
import socket
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import functional as TF

from benchmarks.common import arguments, finish
from dfkd_dist.config import Recipe, parse
from dfkd_dist.data.archives import Archive
from dfkd_dist.data.pixels import to_image_space
from dfkd_dist.data.shards.build import BuildOptions, build
from dfkd_dist.data.shards.encode import Encoding
from dfkd_dist.data.shards.inputs import Input
from dfkd_dist.data.shards.manifest import Manifest, read_manifest, write_manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.data.stream.stream import scan
from dfkd_dist.engine.teachers import make_teacher, teacher_cards
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.launch import join_at, leave
from dfkd_dist.parallel.mesh import make_mesh
from dfkd_dist.parallel.topology import make_topology
from dfkd_dist.sources.selection_scored import TopSelector
from dfkd_dist.sources.selection_scoring import Panel, Scoring
from dfkd_dist.sources.selection_share import Share

FOLDER = Path("runs/benchmark/selection")
ARCH, RANKS, SIZE, BATCH, PER_SHARD = "lenet5", 4, 32, 256, 5_000
FULL, QUICK = (60_000, 600_000), (1_000, 4_000)
ARCHIVES = ("photos_ood_jpg.npz", "tinyimagenet32_100c_jpg.npz", "cifar10_jpg.npz")


def main() -> None:
    """Make the images, run each size in ranks of its own, print and write the table."""
    given = arguments(__doc__ or "")
    torch.set_num_threads(1)
    sizes, ranks = (QUICK, 2) if given.quick else (FULL, RANKS)
    manifest = build_images(max(sizes), workers=1 if given.quick else 2)
    found = {
        count: in_ranks(ranks, first_shards(manifest, count), repeats=1 if count > 100_000 else 3) for count in sizes
    }
    rows = [row(count, part) for count, part in found.items()]
    small, large = rows
    headline = {
        "name": f"selecting from {large['images']:,} on {ranks} ranks / 1 / (1 / decode + 1 / teacher)",
        "value": large["share_of_limit"],
        "unit": "",
        "aim": 0.85,
    }
    growth = large["anonymous_mib"] - small["anonymous_mib"]
    finish("selection", given, rows, headline, teacher=ARCH, batch=BATCH, ranks=ranks, growth_mib=growth)


def row(count: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates by the slowest rank of each repeat, memory of the largest rank."""
    seconds = {
        name: median([max(times) for times in zip(*(rank["seconds"][name] for rank in ranks), strict=True)])
        for name in ranks[0]["seconds"]
    }
    rates = {name: count / taken for name, taken in seconds.items()}
    limit = 1 / (1 / rates["decode"] + 1 / rates["teacher"])
    return {
        "images": count,
        "select_per_s": rates["select"],
        "decode_per_s": rates["decode"],
        "teacher_per_s": rates["teacher"],
        "share_of_limit": rates["select"] / limit,
        "anonymous_mib": max(rank["peak"] for rank in ranks) / 2**20,
        "before_mib": max(rank["before"] for rank in ranks) / 2**20,
        "manifest_mib": 24 * count / 2**20,
    }


# ------------------------------------------------------------------------------------------------------- images


class Crops(Input):
    """Image i is a crop of a picture that i chooses: between half of it and all of it, at 32 px, perhaps mirrored."""

    kind = "crops"

    def __init__(self, count: int) -> None:
        super().__init__(count, None, None)

    def read(self, i: int) -> Tensor:
        """uint8 `[3, 32, 32]`."""
        random = np.random.Generator(np.random.Philox(key=0, counter=i))
        pictures = _pictures()
        encoded = pictures[int(random.integers(len(pictures)))]
        image = decode_jpeg(torch.from_numpy(encoded))
        image = image.expand(3, -1, -1)
        side = int(random.integers(image.shape[1] // 2, image.shape[1] + 1))
        top, left = random.integers(image.shape[1] - side + 1, size=2)
        crop = image[:, top : top + side, left : left + side]
        crop = TF.resize(crop, [SIZE, SIZE], antialias=True) if side != SIZE else crop
        return crop.flip(-1) if random.integers(2) else crop

    def described(self) -> str:
        """For messages."""
        return "crops of the benchmark images"

    def where(self, i: int) -> str:
        """For messages."""
        return f"crop {i}"

    def identity(self) -> dict[str, Any]:
        """All that the crops depend on."""
        return {"kind": self.kind, "archives": list(ARCHIVES), "count": len(self)}


@functools.cache
def _pictures() -> list[Any]:
    found = []
    for name in ARCHIVES:
        with Archive(str(Path("data") / name)) as archive:
            data, offsets = archive.read("train_bytes"), archive.read("train_offsets").tolist()
        found += [data[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    return found


def build_images(count: int, workers: int) -> Manifest:
    """Shards of `count` crops; made once, and an interrupted call goes on."""
    options = BuildOptions(Encoding(format="jpg", quality=90), maxcount=min(PER_SHARD, count // 4), maxsize_mb=None)
    return build(Crops(count), FOLDER / str(count), options, workers=workers, progress=True)


def first_shards(manifest: Manifest, count: int) -> str:
    """A manifest of the first shards alone, `count` images."""
    folder = FOLDER / f"first{count}of{len(manifest)}"
    folder.mkdir(exist_ok=True)
    entries = list(manifest.entries())[: count * len(manifest.shards) // len(manifest)]
    named = [{**entry, "name": str((FOLDER / str(len(manifest)) / entry["name"]).resolve())} for entry in entries]
    path = write_manifest(folder, named, None)
    if len(read_manifest(path)) != count:
        raise RuntimeError(f"{path}: {len(read_manifest(path))} images, expected {count}")
    return path


# -------------------------------------------------------------------------------------------------------- ranks


def in_ranks(size: int, shards: str, repeats: int) -> list[dict[str, Any]]:
    """What each of `size` fresh processes measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, size, port, shards, repeats, out)) for r in range(size)]
    for rank in ranks:
        rank.start()
    found = [out.get(timeout=7200) for _ in ranks]
    for rank in ranks:
        rank.join()
    return found


def _rank(rank: int, size: int, port: int, shards: str, repeats: int, out: Any) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    join_at(rank, size, port, timeout_s=3600)
    work = Work(shards, size)
    seconds: dict[str, list[float]] = {"select": [], "decode": [], "teacher": []}
    work.teacher(chunks=2)  # threads, kernels and buffers come into being
    before, peak = anonymous(), 0
    for _ in range(repeats):
        for name, act in {"select": work.select, "decode": work.decode, "teacher": work.teacher}.items():
            work.wait()
            with Peak() as memory:
                start = time.perf_counter()
                act()
                seconds[name].append(time.perf_counter() - start)
            if name == "select" and not peak:
                peak = memory.peak
    out.put({"seconds": seconds, "before": before, "peak": peak})
    leave()


class Work:
    """One rank's part of selecting half of a set, and of what that consists of."""

    def __init__(self, shards: str, ranks: int) -> None:
        spec = _recipe(shards)
        source: Any = spec.source
        self.recipe, self.reader, self.selection = spec, source.reader, source.selection
        self.manifest = read_manifest(shards)
        cards = teacher_cards(spec)
        self.mesh = make_mesh(make_topology(ranks, [1.0]), torch.device("cpu"))
        self.network = make_teacher(spec, 0, cards, torch.device("cpu"), spec.precision)[1]
        self.exchange = Exchange(self.mesh, [self.network], [{LOGITS: (10,)}], frozenset({LOGITS}))
        self.cards = cards
        self.share = Share(self.manifest, self.reader, BATCH, 0, self.mesh.world)

    def wait(self) -> None:
        """For all ranks."""
        self.mesh.world.sum_(torch.zeros(1))

    def select(self) -> None:
        """As `dfkd train` and `dfkd select` do."""
        count = len(self.manifest) // 2
        selection = self.selection.model_copy(update={"count": count})
        with tempfile.TemporaryDirectory(dir=FOLDER) as cache:
            panel = Panel(
                self.mesh,
                self.exchange,
                self.cards,
                [1.0],
                self.recipe.image,
                torch.float32,
                torch.device("cpu"),
                Path(cache),
            )
            scoring = Scoring(self.share, BATCH, panel, Quarantine(None, self.mesh.rank))
            selector = TopSelector(selection, scoring)
            for step in range(selector.steps(0)):
                selector.score(0, step, None)
            if int(selector.chosen(0).sum()) != count:
                raise RuntimeError("the selection is not of the size that was asked for")
            scoring.kept.close()

    def decode(self) -> None:
        """Read and decode this rank's chunks."""
        images = scan(self.manifest, self.reader, batch=BATCH, size=SIZE, channels=3, chunks=self.share.chunks)
        if sum(len(raw.images_NCHW) for raw in images) != int(self.share.offsets[-1]):
            raise RuntimeError("images are missing")

    def teacher(self, chunks: int | None = None) -> None:
        """As many images, from memory, through the teacher."""
        first = [chunk for chunk in self.share.chunks[:1]]
        images = next(scan(self.manifest, self.reader, batch=BATCH, size=SIZE, channels=3, chunks=first)).images_NCHW
        for chunk in self.share.chunks[:chunks]:
            with torch.no_grad():
                self.network(to_image_space(images[: chunk.count])).logits_NC.float().cpu()


def _recipe(shards: str) -> Recipe:
    tree = {
        "name": "selection",
        "method": "selection",
        "image": {"size": SIZE, "channels": 3},
        "num_classes": 10,
        "rounds": {"main": 1},
        "teachers": [{"name": "t", "weights": "random", "arch": ARCH}],
        "student": {"arch": ARCH},
        "source": {
            "kind": "stream",
            "reader": {"shards": shards, "workers": 0},
            "selection": {"kind": "top", "count": 1, "batch": BATCH},
        },
    }
    return parse(Recipe, tree)


class Peak:
    """The largest anonymous memory of this process while the context is open, seen ten times a second."""

    def __enter__(self) -> Peak:
        self.peak, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/smaps_rollup says nothing about anonymous memory")


if __name__ == "__main__":
    main()
