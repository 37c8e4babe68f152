"""Which samples of a stream are used: as a file says, some at random, the best by score, or anew in every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dfkd_dist.config import ImageSpec, ReaderSpec, RoundsSpec, SelectionSpec
from dfkd_dist.data.selection import read_selection
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.topn import top_n
from dfkd_dist.sources.selection_scored import KD3Selector, TopSelector, own_numbers
from dfkd_dist.sources.selection_scoring import Panel, Scoring
from dfkd_dist.sources.selection_share import Share, together

CACHE = "cache"
"""The folder in a run that keeps the teachers' answers."""


class Selector(Protocol):
    """Chooses among the samples of a set. Every rank calls everything alike, except `state_dict`."""

    @property
    def images(self) -> int:
        """Images of one step of `score` over all ranks."""
        ...

    def steps(self, round: int) -> int:
        """Steps of this round's selection; 0 where the former choice stays."""
        ...

    def score(self, round: int, step: int, student: ImageNetwork) -> None:
        """Look at the next chunk of every rank; the last step makes the choice.

        Steps of the round that were done by an earlier process are redone first: nothing moves the student in
        between, so they come out alike.
        """
        ...

    def chosen(self, round: int) -> NDArray[np.bool_]:
        """`[N]` the choice for a round, the same on all ranks; asked after the round's last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The present choice, where it is not a function of the recipe. Talks to nobody."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


class FixedSelector:
    """A choice that never changes and that the recipe alone determines."""

    images = 0

    def __init__(self, chosen_N: NDArray[np.bool_]) -> None:
        self._chosen_N = chosen_N

    def steps(self, round: int) -> int:
        """None."""
        return 0

    def score(self, round: int, step: int, student: ImageNetwork) -> None:
        """Never asked for."""
        raise NotImplementedError("this selection has no steps")

    def chosen(self, round: int) -> NDArray[np.bool_]:
        """See Selector."""
        return self._chosen_N

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""


class ManifestSelector(FixedSelector):
    """Follows a file that `dfkd select` wrote.

    Raises:
        DatasetError: see `data.selection.read_selection`.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        super().__init__(read_selection(path, manifest).chosen_N)


class RandomSelector(FixedSelector):
    """The `count` samples with the smallest numbers of their own, so that a larger count holds a smaller one.

    No image is looked at, so one that cannot be decoded may be among them; it keeps its slot in the stream, masked.

    Raises:
        DatasetError: fewer samples than `count`.
    """

    def __init__(self, count: int, share: Share) -> None:
        share.check(count)
        ids_n = share.own_ids()
        super().__init__(share.united(top_n(own_numbers(share.seed, ids_n), ids_n, count, share.world, largest=False)))


def make_selector(
    spec: SelectionSpec,
    reader: ReaderSpec,
    manifest: Manifest,
    *,
    mesh: Mesh,
    exchange: Exchange,
    teacher_weights: Sequence[float],
    cards: Sequence[Card],
    image: ImageSpec,
    rounds: RoundsSpec,
    seed: int,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quarantine: Quarantine,
) -> Selector:
    """The selection that a recipe asks for; every rank calls it alike.

    Args:
        spec: which one.
        reader: of the stream.
        manifest: the set.
        mesh: groups.
        exchange: this rank's teachers.
        teacher_weights: w_k, summing to 1.
        cards: of all teachers.
        image: canonical size and channels.
        rounds: of the run.
        seed: of the run.
        folder: of the run; keeps the teachers' answers where `spec.cache` names no other.
        dtype: of images.
        device: where networks live.
        quarantine: is told of samples that cannot be read.

    Raises:
        DatasetError: a file does not fit the set, or there are fewer samples than asked for.
    """
    if spec.kind == "manifest":
        path = str(spec.path)
        return together(mesh.world, lambda: ManifestSelector(path, manifest))
    share = Share(manifest, reader, spec.batch, seed, mesh.world)
    if spec.kind == "random":
        assert spec.count is not None
        return RandomSelector(spec.count, share)
    cache = folder / CACHE if spec.cache is None else Path(spec.cache)
    panel = Panel(mesh, exchange, cards, teacher_weights, image, dtype, device, cache)
    scoring = Scoring(share, spec.batch, panel, quarantine)
    return TopSelector(spec, scoring) if spec.kind == "top" else KD3Selector(spec, scoring, rounds)
