"""Building a set of shards, by several processes, in a folder that survives a kill at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.encode import Encoding, encode
from dfkd_dist.data.shards.inputs import Input, names_digest
from dfkd_dist.data.shards.manifest import FORMAT, NO_LABEL, Manifest
from dfkd_dist.data.shards.run import run_jobs
from dfkd_dist.data.shards.tar import BLOCK, Sample, write_shard
from dfkd_dist.data.shards.workplace import Workplace

_PROBES = 64
"""Images that are encoded to find how many fill a shard."""


@dataclass(frozen=True)
class BuildOptions:
    """How an input becomes shards.

    Args:
        maxcount: samples in a shard, at most.
        maxsize_mb: aimed-at size of a shard in MB (10^6 bytes), from the mean of some images; None: no aim.
        shuffle: seed of one permutation of all samples before they are dealt; None keeps the input's order.
        limit: only the first so many samples (after shuffling).
        on_bad: `stop` at an image that cannot be stored, or `skip` it and note it in `skipped.jsonl`.
        labels: False leaves out what labels the input has.
    """

    encoding: Encoding = Encoding()
    maxcount: int = 1000
    maxsize_mb: float | None = 256
    shuffle: int | None = None
    limit: int | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    labels: bool = True

    def __post_init__(self) -> None:
        """ValueError names the option that is out of range."""
        for name in ("maxcount", "maxsize_mb", "limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: found {value}, allowed are numbers above 0")
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle: found {self.shuffle}, allowed are seeds of 0 and more")
        if self.on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad: found {self.on_bad!r}, allowed are stop, skip")


def build(
    source: Input,
    folder: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write `source` as shards into `folder`; an interrupted build goes on where it was.

    The shards' bytes depend on the input and the options, not on `workers` or on interruptions. A finished set of the
    same recipe is left alone. Raises DatasetError for a folder that holds something else, for an input that changed
    since the build began, and for images that cannot be stored.
    """
    if source.lies_in(folder):
        raise DatasetError(f"{folder}: holds the tars that are to be read; choose another folder")
    place = Workplace(folder)
    order_N = _order(len(source), options)
    per_shard = _per_shard(source, order_N, options)
    classes = source.classes if options.labels else None
    recipe = {
        "format": FORMAT,
        "kind": "build",
        "input": source.identity(),
        "classes": names_digest(classes or []),
        "options": asdict(options),
        "per_shard": per_shard,
    }
    jobs = _BuildJobs(source, order_N, per_shard, options, place)
    return run_jobs(place, recipe, jobs, classes, workers=workers, overwrite=overwrite, progress=progress)


class _BuildJobs:
    """Shard s holds places [s * per_shard, (s + 1) * per_shard) of the order."""

    def __init__(
        self, source: Input, order_N: NDArray[np.int64], per_shard: int, options: BuildOptions, place: Workplace
    ) -> None:
        self._source, self._order_N, self._per_shard = source, order_N, per_shard
        self._options, self._place = options, place

    def __len__(self) -> int:
        return -(-len(self._order_N) // self._per_shard)

    def __call__(self, number: int) -> int:
        note = self._place.noted(number)
        if note is not None and self._place.is_whole(note, number):
            entry = note["entry"]
        else:
            skipped: list[dict[str, str]] = []
            samples = self._samples(number, skipped)
            first = next(samples, None)
            path = self._place.shard_path(number)
            entry = None if first is None else write_shard(path, chain([first], samples))
            self._place.note(number, entry, skipped)
        return 0 if entry is None else int(entry["count"])

    def _samples(self, number: int, skipped: list[dict[str, str]]) -> Iterator[Sample]:
        source, options = self._source, self._options
        for i in self._order_N[number * self._per_shard : (number + 1) * self._per_shard].tolist():
            try:
                suffix, data = encode(source.read(i), options.encoding)
            except (ValueError, RuntimeError, OSError) as error:
                if options.on_bad == "stop":
                    raise DatasetError(f"{source.where(i)}: cannot be stored: {error}") from error
                skipped.append({"key": source.key(i), "where": source.where(i), "reason": str(error)})
                continue
            yield Sample(source.key(i), suffix, data, int(source.labels_N[i]) if options.labels else NO_LABEL)


def _order(count: int, options: BuildOptions) -> NDArray[np.int64]:
    order_N = np.arange(count, dtype=np.int64)
    if options.shuffle is not None:
        order_N = np.random.Generator(np.random.Philox(key=options.shuffle)).permutation(order_N)
    return order_N[: options.limit]


def _per_shard(source: Input, order_N: NDArray[np.int64], options: BuildOptions) -> int:
    """The same for all shards, from the mean size of images that are spread over the order."""
    if options.maxsize_mb is None:
        return options.maxcount
    sizes = []
    for place in np.linspace(0, len(order_N) - 1, min(_PROBES, len(order_N))).astype(np.int64).tolist():
        try:
            _, data = encode(source.read(int(order_N[place])), options.encoding)
        except (ValueError, RuntimeError, OSError):
            continue  # the build itself will stop at it, or skip it
        # With the image's header, and with its label's header and block.
        sizes.append((-(-len(data) // BLOCK) + 3) * BLOCK)
    mean = sum(sizes) / len(sizes) if sizes else 1
    return max(1, min(options.maxcount, int(options.maxsize_mb * 1e6 / mean)))
