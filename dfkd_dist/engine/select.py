"""`dfkd select`: the teachers look at a set of shards once, and a file says which samples a stream shall use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dfkd_dist.config import ReaderSpec, Recipe, RecipeError, SelectionSpec
from dfkd_dist.data.compact import compact
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.selection import Chosen, SelectionWriter, read_selection
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.engine.checks import agreed
from dfkd_dist.engine.teachers import make_teacher, reference_classes, teacher_cards, teacher_costs, teacher_weights
from dfkd_dist.engine.trainer import Stopped
from dfkd_dist.models.cards import Card
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.launch import LaunchFacts, join, launch_facts, leave
from dfkd_dist.parallel.mesh import Mesh, make_mesh
from dfkd_dist.parallel.stopping import EXIT_LOST_RANK, EXIT_STOPPED, Heartbeats, StopFlag, agree
from dfkd_dist.parallel.topology import make_topology
from dfkd_dist.sources.selection import RandomSelector
from dfkd_dist.sources.selection_scored import TopSelector
from dfkd_dist.sources.selection_scoring import Panel, Scoring
from dfkd_dist.sources.selection_share import Share

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_S = 1800.0
_LINES = 10
_CLASSES = 20
"""A table lists so many."""


@dataclass(frozen=True)
class Tally:
    """What a selection came to, over all ranks.

    Args:
        samples: of the set.
        scored: images that were read and asked about.
        unreadable: how many could not be read, by cause.
        chosen: how many are in the file.
        classes: how many of them have which pseudo-label; empty without labels.
        lowest: the smallest score chosen, or None.
        highest: the largest, or None.
        seconds: of scoring.
    """

    samples: int
    scored: int
    unreadable: dict[str, int]
    chosen: int
    classes: dict[str, int] = field(default_factory=dict)
    lowest: float | None = None
    highest: float | None = None
    seconds: float = 0.0

    def table(self) -> str:
        """For people."""
        rows = [("samples", f"{self.samples:,}"), ("scored", f"{self.scored:,}")]
        rows += [(f"unreadable: {cause}", f"{n:,}") for cause, n in sorted(self.unreadable.items())]
        rows += [("chosen", f"{self.chosen:,}")]
        rows += self._class_rows()
        if self.lowest is not None:
            rows += [("scores chosen", f"{self.lowest:.6g} .. {self.highest:.6g}")]
        if self.scored:
            rows += [("seconds", f"{self.seconds:.1f}"), ("images/s", f"{self.scored / max(self.seconds, 1e-9):,.0f}")]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

    def _class_rows(self) -> list[tuple[str, str]]:
        """Each class, or those with fewest and most where there are many."""
        if len(self.classes) <= _CLASSES:
            return [(f"  class {name}", f"{n:,}") for name, n in self.classes.items()]
        ordered = sorted(self.classes.items(), key=lambda item: item[1])
        rows = [("  classes with none", f"{sum(n == 0 for n in self.classes.values()):,} of {len(ordered):,}")]
        some = [*ordered[: _CLASSES // 2], *ordered[-_CLASSES // 2 :]]
        return rows + [(f"  class {name}", f"{n:,}") for name, n in some]


def select(
    recipe: Recipe,
    out: Path,
    facts: LaunchFacts | None = None,
    *,
    into: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> tuple[int, Tally | None]:
    """Choose and write on this rank; every rank of the launch calls it.

    Args:
        recipe: its teachers look, its source names the shards and the selection (`top` or `random`).
        out: the file to write.
        facts: how this rank was launched.
        into: also write the chosen samples as shards of their own into this folder.
        overwrite: `out` may exist.
        device: auto, cpu or cuda.

    Returns:
        The process's exit code (0, or EXIT_STOPPED after a signal: the same command goes on from the answers that
        are kept beside `out`), and what came out.

    Raises:
        ValueError: something was refused (RecipeError, WeightsError, DatasetError ...).
        SystemExit: a peer was lost (EXIT_LOST_RANK); the message names it.
    """
    reader, spec = what_to_select(recipe)
    if out.exists() and not overwrite:
        raise DatasetError(f"{out} exists; give --overwrite, or another --out")
    facts = facts or launch_facts()
    place = join(facts, timeout_s=COLLECTIVE_TIMEOUT_S, device=device)
    with Heartbeats(facts) as heartbeats, StopFlag() as stop_flag:
        try:
            return 0, _Job(recipe, reader, spec, out, into, place, facts.world_size, stop_flag).run()
        except Stopped as stopped:
            log.warning("%s (%s); the same command goes on", stopped, stop_flag.signal)
            return EXIT_STOPPED, None
        except RuntimeError as error:
            if facts.world_size == 1:
                raise
            explanation = heartbeats.explain(error)
            if heartbeats.lost() is None:
                raise
            log.error("%s", explanation)
            raise SystemExit(EXIT_LOST_RANK) from error
        finally:
            leave()


def what_to_select(recipe: Recipe) -> tuple[ReaderSpec, SelectionSpec]:
    """The shards and the selection of a recipe.

    Raises:
        RecipeError: it reads no shards, or its selection is not one that can be made before a run.
    """
    reader, spec = getattr(recipe.source, "reader", None), getattr(recipe.source, "selection", None)
    if reader is None:
        raise RecipeError(f"source.kind is {recipe.source.kind!r} and reads no shards; allowed here: one with a reader")
    if reader.kind != "tar":
        raise RecipeError(
            f"source.reader.kind is {reader.kind!r}; allowed for dfkd select: tar (a file names samples as shards do)"
        )
    kind = None if spec is None else spec.kind
    if spec is None or kind not in ("top", "random"):
        why = "; kd3 chooses anew in every round, by the student of that round" if kind == "kd3" else ""
        raise RecipeError(f"source.selection.kind is {kind!r}; allowed for dfkd select: top, random{why}")
    return reader, spec


class _Job:
    def __init__(
        self,
        recipe: Recipe,
        reader: ReaderSpec,
        spec: SelectionSpec,
        out: Path,
        into: Path | None,
        device: torch.device,
        world_size: int,
        stop_flag: StopFlag,
    ) -> None:
        torch.set_flush_denormal(True)
        self.recipe, self.spec, self.out, self.into, self.stop_flag = recipe, spec, out, into, stop_flag
        cards = teacher_cards(recipe)
        self.mesh: Mesh = make_mesh(make_topology(world_size, teacher_costs(cards), recipe.mesh.rows), device)
        self.world: Group = self.mesh.world
        self.manifest: Manifest = agreed(self.world, lambda: read_manifest(reader.shards))
        self.share = Share(self.manifest, reader, spec.batch, recipe.seed, self.world)
        self.classes = reference_classes(cards)
        self.scorer = TopSelector(spec, self._scoring(cards, device), details=True) if spec.kind == "top" else None

    def _scoring(self, cards: list[Card], device: torch.device) -> Scoring:
        recipe, mesh = self.recipe, self.mesh
        held = agreed(
            self.world, lambda: [make_teacher(recipe, k, cards, device, recipe.precision)[1] for k in mesh.teachers]
        )
        shapes = [{LOGITS: (card.num_classes,)} for card in cards]
        exchange = Exchange(mesh, held, shapes, frozenset({LOGITS}))
        dtype = torch.float64 if recipe.precision.train == "fp64" else torch.float32
        cache = Path(self.spec.cache) if self.spec.cache is not None else self.out.with_name(self.out.name + ".answers")
        panel = Panel(mesh, exchange, cards, teacher_weights(recipe), recipe.image, dtype, device, cache)
        return Scoring(self.share, self.spec.batch, panel, Quarantine(None, self.world.rank))

    def run(self) -> Tally:
        """Score, write, tell."""
        started = time.monotonic()
        if self.scorer is None:
            assert self.spec.count is not None
            chosen_N = RandomSelector(self.spec.count, self.share).chosen(0)
        else:
            self._score(self.scorer)
            chosen_N = self.scorer.chosen(0)
        seconds = time.monotonic() - started
        self._on_first(self._writer(chosen_N))
        if self.into is not None:
            self._on_first(self._compact)
        return self._tally(chosen_N, seconds)

    def _score(self, scorer: TopSelector) -> None:
        steps = scorer.steps(0)
        with tqdm(total=steps * scorer.images, unit="image", disable=None if self.world.rank == 0 else True) as bar:
            for step in range(steps):
                scorer.score(0, step, None)
                bar.update(scorer.images)
                if bar.disable and self.world.rank == 0 and (step + 1) * _LINES // steps > step * _LINES // steps:
                    log.info("scored %d%%", 100 * (step + 1) // steps)
                if agree(self.world, stop=self.stop_flag.signal is not None, failed=False).stop:
                    raise Stopped(f"stopped by a signal after {step + 1} of {steps} steps")

    # ------------------------------------------------------------------------------------------ the file

    def _writer(self, chosen_N: NDArray[np.bool_]) -> Callable[[], None]:
        """What rank 0 does with the shards' parts, which all ranks bring together one shard after another."""
        parts = self._parts(chosen_N)
        if self.world.rank != 0:
            for _ in parts:
                pass
            return lambda: None

        def write() -> None:
            names = [spec.name for spec in self.recipe.teachers]
            try:
                with SelectionWriter(self.out, self.manifest, int(chosen_N.sum()), self._criterion(), names) as writer:
                    for shard, keys in enumerate(self.manifest.all_keys()):
                        writer.add(shard, keys, next(parts))
            finally:
                for _ in parts:  # the others bring theirs, whatever happened here
                    pass

        return write

    def _parts(self, chosen_N: NDArray[np.bool_]) -> Iterator[Chosen]:
        """Each shard's chosen samples with what is known of them; the memory is that of one shard."""
        ids_n = self.share.own_ids()
        for shard in self.manifest.shards:
            index_n = np.flatnonzero(chosen_N[shard.start : shard.start + shard.count])
            if self.scorer is None:
                yield Chosen(index_n)
                continue
            low, high = np.searchsorted(ids_n, [shard.start, shard.start + shard.count])
            own, at_n = slice(int(low), int(high)), ids_n[low:high] - shard.start
            told_3N = np.zeros((3, shard.count))
            kept: list[NDArray[Any]] = [self.scorer.scores_n, self.scorer.labels_n, self.scorer.teachers_n]
            for row, values in enumerate(kept):
                told_3N[row, at_n] = values[own]
            told_3N = self._summed(told_3N)[:, index_n]
            yield Chosen(index_n, told_3N[0].astype(np.float32), told_3N[1].astype(int), told_3N[2].astype(int))

    def _summed(self, told: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over all ranks: each number is one rank's, and 0 on the others, so it comes out as it was."""
        if self.world.size == 1:
            return told
        return self.world.sum_(torch.from_numpy(told).to(self.world.device_type)).cpu().numpy()

    def _criterion(self) -> dict[str, Any]:
        """As in the recipe, without where answers are kept."""
        told = self.spec.model_dump(exclude={"cache", "path", "threshold", "counts", "mode"})
        return told | {"fraction": self.share.reader.fraction, "seed": self.recipe.seed}

    def _compact(self) -> None:
        if self.world.rank == 0:
            assert self.into is not None
            selection = read_selection(self.out, self.manifest, labels=True)
            compact(self.manifest, selection, self.into, self.classes)

    def _on_first(self, act: Callable[[], None]) -> None:
        agreed(self.world, act)

    # ----------------------------------------------------------------------------------------- the table

    def _tally(self, chosen_N: NDArray[np.bool_], seconds: float) -> Tally:
        chosen = int(chosen_N.sum())
        if self.scorer is None:
            return Tally(len(self.manifest), 0, {}, chosen)
        scorer, own_n = self.scorer, chosen_N[self.share.own_ids()]
        num_classes = scorer.scoring.panel.cards[0].num_classes
        counts_C = self._summed(np.bincount(scorer.labels_n[own_n], minlength=num_classes).astype(float))
        names = self.classes or [str(c) for c in range(num_classes)]
        ends = self._ends(scorer.scores_n[own_n])
        return Tally(
            len(self.manifest),
            scorer.read(),
            _added(self.world.gather_objects(dict(scorer.scoring.quarantine.counts))),
            chosen,
            {name: int(n) for name, n in zip(names, counts_C, strict=True)},
            min(ends, default=None),
            max(ends, default=None),
            seconds,
        )

    def _ends(self, scores_n: NDArray[np.float32]) -> list[float]:
        """Each rank's smallest and largest score."""
        own = [float(scores_n.min()), float(scores_n.max())] if len(scores_n) else []
        return [score for part in self.world.gather_objects(own) for score in part]


def _added(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for cause, n in part.items():
            total[cause] = total.get(cause, 0) + n
    return total
