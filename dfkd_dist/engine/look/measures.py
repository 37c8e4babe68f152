"""What `dfkd evaluate` measures besides accuracy: one request, and its results as plain values and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dfkd_dist.engine.build import Build
from dfkd_dist.engine.look import balance as balances
from dfkd_dist.engine.look import fid as fids
from dfkd_dist.engine.look import sheet as sheets
from dfkd_dist.engine.look import tsne as maps
from dfkd_dist.engine.look.collection import Collection
from dfkd_dist.engine.look.named import DATA, Finder
from dfkd_dist.engine.look.networks import STUDENT, FeatureNetwork, Judge, feature_network, inception_features, judge
from dfkd_dist.engine.look.patches import patch_fid
from dfkd_dist.engine.look.plots import new_figure

BALANCE, SHEET, TSNE, CLUSTERS = "balance.png", "sheet.png", "tsne.png", "clusters.png"


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Args:
        fid: Frechet distance of the pool to the real images.
        per_class: and by class.
        patches: patch FID for each of these L.
        balance: shares of the classes in the pool.
        sheet: contact sheet of the pool.
        tsne: map of real, selected and unselected features.
        clusters: map of a student's features by class.
        real: words of the real images (`named.Finder`).
        pool: words of the pool; empty: what the student learned from.
        features: network whose features are compared; None: the first teacher.
        inception: Inception-v3's weights file instead.
        judge: who says which class an image is of; None: the teachers.
        predicted: the judge is asked even where labels are known.
        beside: a second network for `clusters`.
        rows: classes of the contact sheet; empty: all.
        per_row: images in one of its rows.
        crops: patches of each image.
        points: images of each group in a map.
        perplexity: of t-SNE.
        images: at most so many of each collection.
        seed: of whatever is chosen at random.
        batch: images at a time.
    """

    fid: bool = False
    per_class: bool = False
    patches: tuple[int, ...] = ()
    balance: bool = False
    sheet: bool = False
    tsne: bool = False
    clusters: bool = False
    real: tuple[str, ...] = (DATA,)
    pool: tuple[str, ...] = ()
    features: str | None = None
    inception: Path | None = None
    judge: str | None = None
    predicted: bool = False
    beside: str | None = None
    rows: tuple[str, ...] = ()
    per_row: int = sheets.PER_CLASS
    crops: int = 1
    points: int = maps.POINTS
    perplexity: float = maps.PERPLEXITY
    images: int | None = None
    seed: int = 0
    batch: int = 256


class Measuring:
    """Takes the measures of one request, one after another.

    Args:
        built: the run, in one process.
        wanted: the request.
        finder: finds its collections.
        folder: where pictures go.
    """

    def __init__(self, built: Build, wanted: Wanted, finder: Finder, folder: Path) -> None:
        self.built, self.wanted, self.finder, self.folder = built, wanted, finder, folder

    def results(self) -> dict[str, Any]:
        """Every measure asked for, by name, as plain values; pictures are written.

        Raises:
            ValueError: something named does not exist or does not fit; names are looked up before anything is measured.
            ImportError: an extra is missing; the message names it.
        """
        wanted, found = self.wanted, dict[str, Any]()
        self._check()
        by_class = None
        if wanted.fid or wanted.per_class:
            by_class, found["fid"] = self._fid()
        if wanted.patches:
            found["patch_fid"] = self._patches()
        if wanted.balance:
            found["balance"] = self._balance(by_class)
        if wanted.sheet:
            found["sheet"] = self._sheet()
        if wanted.tsne:
            found["tsne"] = self._tsne()
        if wanted.clusters:
            found["clusters"] = self._clusters()
        return found

    # ---------------------------------------------------------------------------------------- who and what

    def _check(self) -> None:
        """Look up what the measures need, and the extras."""
        wanted = self.wanted
        distances = wanted.fid or wanted.per_class or bool(wanted.patches)
        if distances:
            fids.new_metric(1)
        if wanted.balance or wanted.tsne or wanted.clusters:
            new_figure((1.0, 1.0))
        needed = {"real", "pool", "features"} if distances or wanted.tsne else set()
        needed |= {"real", "shown"} if wanted.clusters else set()
        needed |= {"pool", "judge"} if wanted.balance or wanted.sheet or wanted.per_class else set()
        for name in sorted(needed):
            getattr(self, name)

    @cached_property
    def real(self) -> Collection:
        """The real images."""
        return self.finder.find(self.wanted.real)

    @cached_property
    def pool(self) -> Collection:
        """What is looked at."""
        return self.finder.find(self.wanted.pool or self.finder.default_pool())

    @cached_property
    def features(self) -> FeatureNetwork:
        """Whose features are compared."""
        if self.wanted.inception is not None:
            return inception_features(self.wanted.inception, self.built.device)
        return feature_network(self.built, self.wanted.features)

    @cached_property
    def shown(self) -> list[FeatureNetwork]:
        """Whose features are shown by class."""
        names = [self.wanted.features or STUDENT, *([self.wanted.beside] if self.wanted.beside else [])]
        return [feature_network(self.built, name) for name in names]

    @cached_property
    def judge(self) -> Judge:
        """Who names classes."""
        return judge(self.built, self.wanted.judge)

    # ------------------------------------------------------------------------------------------- measures

    def _fid(self) -> tuple[fids.FidByClass | None, dict[str, Any]]:
        real, pool, network, wanted = self.real, self.pool, self.features, self.wanted
        about = {"real": real.name, "pool": pool.name, "features_of": network.name}
        if not wanted.per_class:
            return None, about | fids.fid(real, pool, network, batch=wanted.batch).as_dict()
        found = fids.fid_by_class(real, pool, network, self.judge, batch=wanted.batch, predicted=wanted.predicted)
        return found, about | found.overall.as_dict() | {"by_class": found.as_dict()}

    def _patches(self) -> dict[str, Any]:
        real, pool, network, wanted = self.real, self.pool, self.features, self.wanted
        sizes = []
        for side in wanted.patches:
            one = patch_fid(real, pool, network, side, batch=wanted.batch, crops=wanted.crops, seed=wanted.seed)
            sizes.append({"size": side, **one.as_dict()})
        about = {"real": real.name, "pool": pool.name, "features_of": network.name}
        return about | {"crops": wanted.crops, "seed": wanted.seed, "sizes": sizes}

    def _balance(self, by_class: fids.FidByClass | None) -> dict[str, Any]:
        found = balances.class_balance(self.pool, self.judge, batch=self.wanted.batch)
        picture = balances.draw_balance(found, self.folder / BALANCE, by_class)
        return found.as_dict() | {"picture": str(picture)}

    def _sheet(self) -> dict[str, Any]:
        pool, asked, wanted = self.pool, self.judge, self.wanted
        rows = sheets.sheet_rows(pool, asked, per_class=wanted.per_row, classes=wanted.rows or None, batch=wanted.batch)
        picture = sheets.save_sheet(rows, self.folder / SHEET, wanted.per_row)
        return {
            "pool": pool.name,
            "judge": asked.name,
            "rows": [row.as_dict() for row in rows],
            "picture": str(picture),
        }

    def _tsne(self) -> dict[str, Any]:
        real, pool, wanted = self.real, self.pool, self.wanted
        rest = pool.rest()
        groups = [("original", real)]
        groups += [(pool.name, pool)] if rest is None else [("selected", pool), ("unselected", rest)]
        network = self.features
        found = maps.map_of_collections(
            groups,
            network,
            points=wanted.points,
            seed=wanted.seed,
            perplexity=wanted.perplexity,
            batch=wanted.batch,
        )
        picture = maps.draw_maps([found], self.folder / TSNE)
        return {"real": real.name, "pool": pool.name, **found.as_dict(), "picture": str(picture)}

    def _clusters(self) -> dict[str, Any]:
        real, wanted = self.real, self.wanted
        drawn = [
            maps.map_of_classes(
                real,
                network,
                points=wanted.points,
                seed=wanted.seed,
                perplexity=wanted.perplexity,
                batch=wanted.batch,
            )
            for network in self.shown
        ]
        picture = maps.draw_maps(drawn, self.folder / CLUSTERS)
        return {"images": real.name, "maps": [one.as_dict() for one in drawn], "picture": str(picture)}
