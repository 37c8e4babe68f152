"""Real images streamed from WebDataset shards: how they are read, and which of them are used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dfkd_dist.config.base import Count, CountOrZero, Fraction, Positive, Spec

Share = Annotated[float, Field(gt=0, le=1)]


class CacheSpec(Spec):
    """A folder that keeps remote shards on this machine's disk."""

    folder: str
    limit_gb: Positive = 50.0
    """The least recently used shards go first."""


class ReaderSpec(Spec):
    """How a set of shards is read."""

    shards: str
    """The folder or URL of a shard set, or its manifest; ffcv: a file that `dfkd shards compile` wrote."""
    kind: Literal["tar", "ffcv"] = "tar"
    workers: CountOrZero = 2
    """Processes that read and decode for each rank; 0 reads in the rank itself."""
    prefetch: Count = 2
    """Batches that each worker keeps ready."""
    window: Count = 20_000
    """Samples among which the order is random; shards are permuted as wholes."""
    fraction: Share = 1.0
    """A nested part of the samples, chosen by each sample's own number: 0.25 lies within 0.5."""
    cache: CacheSpec | None = None
    retries: CountOrZero = 5
    """Further tries of a remote read that failed, with growing waits."""
    timeout_s: Positive = 30.0
    """A remote request (of at most 4 MiB) that takes longer has failed; so has a command that is silent for so long."""
    pixel_limit: Count = 2**26
    """Largest height x width that is decoded."""
    bad_limit: Fraction = 0.01
    """A larger share of unreadable samples (of those asked for, once there are a hundred) stops the run."""

    @model_validator(mode="after")
    def _cache_is_for_tars(self) -> ReaderSpec:
        if self.kind == "ffcv" and self.cache is not None:
            raise ValueError("cache is a key of kind: tar; a compiled file lies on this machine already")
        return self


class SelectionSpec(Spec):
    """Which samples of a stream are used.

    `manifest` follows a file that `dfkd select` wrote. `top` takes the `count` samples with the highest (or lowest)
    score once, before the first round: DFND's highest confidence, MosaicKD's highest entropy or lowest confidence.
    `random` takes `count` of them by their own numbers. `kd3` selects anew in every round (KD3 Eqs. 2-8).
    """

    kind: Literal["manifest", "top", "random", "kd3"]
    path: str | None = None
    """manifest: the file."""
    score: Literal["confidence", "entropy"] = "confidence"
    """top: of the weighted mean of the teachers' probabilities."""
    order: Literal["highest", "lowest"] = "highest"
    count: Count | None = None
    """top, random: how many; kd3 with mode random takes as many as the dynamic rule would."""
    balanced: bool = False
    """top: the same number from every class that the teachers predict (as far as there are so many)."""
    threshold: Fraction = 0.95
    """kd3: V_th of Eq. 6."""
    counts: Literal["all", "confident"] = "all"
    """kd3: n_i counts every predicted label (Eqs. 6-7 as printed), or those above the threshold."""
    mode: Literal["dynamic", "teacher", "student", "random"] = "dynamic"
    """kd3: alpha(t) of Eq. 4, always 0, always 1, or as many at random (Table 2)."""
    batch: Count = 256
    """Images that are scored at once; never across two shards."""
    cache: str | None = None
    """A folder in which the teachers' answers are kept between runs; null keeps them in the run."""

    @model_validator(mode="after")
    def _keys_belong_to_kinds(self) -> SelectionSpec:
        if (self.kind == "manifest") != (self.path is not None):
            raise ValueError("path is needed by kind: manifest, and only there")
        if (self.kind in ("top", "random")) != (self.count is not None):
            raise ValueError("count is needed by kind: top and kind: random, and only there")
        return self


class StreamSpec(Spec):
    """Real images, selected from a set of shards, for the student alone: DFND, KD3, plain distillation on them."""

    kind: Literal["stream"]
    reader: ReaderSpec
    selection: SelectionSpec | None = None
    """null uses every sample."""
