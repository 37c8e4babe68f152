"""Collections by the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.config import DatasetSpec, ReaderSpec, apply_override, parse
from dfkd_dist.data.compiled.about import SUFFIX
from dfkd_dist.data.datasets import Split
from dfkd_dist.data.selection import read_selection
from dfkd_dist.data.shards.manifest import MANIFEST, Manifest
from dfkd_dist.data.stream.sets import open_set, taking_part
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.evaluate import kept_set
from dfkd_dist.engine.look.collection import Collection, GeneratorCollection, SetCollection, folder_collection
from dfkd_dist.engine.look.pool import PoolCollection
from dfkd_dist.engine.look.shards import ShardCollection
from dfkd_dist.sources.generative import GenerativeSource
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.selection import Selector

DATA, GENERATORS, STREAM, UNSELECTED = "data", "generators", "stream", "unselected"
POOL = "pool"
"""Words for what belongs to the run: its evaluation set (`--data`), its generators' images, the images of its stream
that its selection chose, and those that it left out."""

ALLOWED = (
    f"{DATA}, {GENERATORS}, generator=TEACHER, {POOL}, {STREAM}, {UNSELECTED}, a folder, a set of shards (its folder, "
    "manifest or URL), shards=PATH selection=FILE, or an image set (kind=... path=... [split=...])"
)
GENERATED = 5000
"""Images of all generators together, where no number is given."""


@dataclass(frozen=True)
class Finder:
    """Finds the collections of one run.

    Args:
        built: the run.
        dataset: what `data` means; None where no image set is known.
        split: of labelled sets that do not say `split=` themselves.
        images: at most so many of each collection, chosen by `seed`; None: all (5,000 of generators).
        seed: of the choice.
    """

    built: Build
    dataset: DatasetSpec | None
    split: Split = "test"
    images: int | None = None
    seed: int = 0

    def find(self, words: Sequence[str]) -> Collection:
        """What the words mean, cut to `images`.

        Raises:
            ValueError: they mean nothing, or nothing that this run has; says what is allowed.
            DatasetError: it is there, but cannot be read.
        """
        found = self._find(list(words))
        return found if self.images is None else found.part(self.images, self.seed)

    def default_pool(self) -> list[str]:
        """What the run's student learned from: its generators' images, or its stream.

        Raises:
            ValueError: it learned from labelled images, so there is no pool.
        """
        if isinstance(self.built.source, GenerativeSource):
            return [GENERATORS]
        if isinstance(self.built.source, InversionSource):
            return [POOL]
        if getattr(self.built.recipe.source, "reader", None) is not None:
            return [STREAM]
        raise ValueError(f"--pool: this run made and chose no images; give one: {ALLOWED}")

    # ------------------------------------------------------------------------------------------ kinds

    def _find(self, words: list[str]) -> Collection:
        match words:
            case [one] if "=" not in one:
                return self._named(one)
            case [one] if one.startswith("generator="):
                return self._generators(one.partition("=")[2])
            case [_, *_] if all("=" in word for word in words):
                tree: dict[str, Any] = {}
                for word in words:
                    apply_override(tree, word)
                return self._shard_set(tree) if "shards" in tree else self._image_set(tree, " ".join(words))
        raise ValueError(f"{' '.join(words)!r} means no images; allowed: {ALLOWED}")

    def _named(self, word: str) -> Collection:
        image = self.built.recipe.image
        if word == DATA:
            if self.dataset is None:
                raise ValueError(f"{DATA}: the run has no evaluation set; give --data kind=... [path=...]")
            return SetCollection(kept_set(self.dataset, self.split), _set_name(self.dataset, self.split))
        if word == GENERATORS:
            return self._generators(None)
        if word == POOL:
            return self._pool()
        if word == STREAM:
            return self._stream()
        if word == UNSELECTED:
            left = self._stream().rest()
            if left is None:
                raise ValueError(f"{UNSELECTED}: this run uses its whole stream")
            return left
        path = Path(word)
        if word.endswith(SUFFIX):
            return self._shard_set({"shards": word, "kind": "ffcv"})
        if "://" in word or word.endswith(".json") or (path / MANIFEST).is_file():
            return self._shard_set({"shards": word})
        if path.is_dir():
            return folder_collection(path, image.size, image.channels)
        raise ValueError(f"{word!r}: no such file, folder or word; allowed: {ALLOWED}")

    def _generators(self, teacher: str | None) -> Collection:
        source = self.built.source
        if not isinstance(source, GenerativeSource):
            raise ValueError(f"{GENERATORS}: this run has none (source.kind is {self.built.recipe.source.kind})")
        kits = [kit for kit in source.kits if teacher in (None, kit.teacher.name)]
        if not kits:
            names = ", ".join(kit.teacher.name for kit in source.kits)
            raise ValueError(f"generator={teacher}: the run has no such teacher; allowed: {names}")
        name = GENERATORS if teacher is None else f"generator of {teacher}"
        return GeneratorCollection(source, kits, self.images or GENERATED, self.built.recipe.batch, name)

    def _pool(self) -> Collection:
        source = self.built.source
        if not isinstance(source, InversionSource) or not len(source.pool):
            raise ValueError(f"{POOL}: this run keeps none (source.kind is {self.built.recipe.source.kind})")
        assert source.pool.shards is not None
        return PoolCollection(source.pool, source.pool.shards.classes, POOL)

    def _image_set(self, tree: dict[str, Any], where: str) -> Collection:
        image, split = self.built.recipe.image, tree.pop("split", self.split)
        tree = {"size": image.size, "channels": image.channels} | tree
        spec = parse(DatasetSpec, tree, where=where)
        return SetCollection(kept_set(spec, split), _set_name(spec, split))

    # ------------------------------------------------------------------------------------------ shards

    def _shard_set(self, tree: dict[str, Any]) -> Collection:
        selection = tree.pop("selection", None)
        reader = parse(ReaderSpec, tree, where="a set of shards")
        manifest = open_set(reader)
        chosen_N = None if selection is None else read_selection(str(selection), manifest).chosen_N
        return self._of_shards(manifest, reader, reader.shards, chosen_N, taking_part(manifest, 1.0, 0))

    def _stream(self) -> Collection:
        reader = getattr(self.built.recipe.source, "reader", None)
        if reader is None:
            raise ValueError(f"{STREAM}: this run reads no stream (source.kind is {self.built.recipe.source.kind})")
        manifest, selector = open_set(reader), getattr(self.built.source, "selector", None)
        chosen_N = None if selector is None else self._chosen(selector)
        part_N = taking_part(manifest, reader.fraction, self.built.recipe.seed)
        return self._of_shards(manifest, reader, STREAM, chosen_N, part_N)

    def _chosen(self, selector: Selector) -> NDArray[np.bool_]:
        """The choice that the run made last: for its present round, or for the one before."""
        now = self.built.trainer.position.round
        for round in (now, max(now - 1, 0)):
            try:
                return selector.chosen(round)
            except RuntimeError:  # not made yet
                continue
        raise ValueError(f"{STREAM}: this run stopped before it had selected anything")

    def _of_shards(
        self,
        manifest: Manifest,
        reader: ReaderSpec,
        name: str,
        chosen_N: NDArray[np.bool_] | None,
        part_N: NDArray[np.bool_] | None = None,
    ) -> Collection:
        """All samples, those of a part, or those of it that were chosen; then `rest()` are the others of it."""
        image = self.built.recipe.image
        within_N = np.ones(len(manifest), dtype=np.bool_) if part_N is None else part_N
        masks = [within_N] if chosen_N is None else [within_N & chosen_N, within_N & ~chosen_N]
        ids = [torch.from_numpy(np.flatnonzero(mask)) for mask in masks]
        return ShardCollection(manifest, reader, image.size, image.channels, name, *ids)


def _set_name(spec: DatasetSpec, split: str) -> str:
    what = spec.name or (Path(spec.path).name if spec.path else spec.kind)
    return f"{what} ({split})"
