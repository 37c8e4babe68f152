"""A round of the real code as any rank of any mesh, without data: for its memory and its arithmetic.

The recipe is built by the same builder and run by the same trainer on tensors of device `meta`, which have shapes but
no values, inside a mesh whose other ranks are imagined (`parallel.dry`). What differs from a real run:

- every question about a value is answered by one, or yes: losses are finite, and every batch norm that follows a
  convolution can be folded into it (a pre-activation network folds fewer);
- weights files and data sets are not read, and pretrained weights are not fetched;
- an optimiser's own temporaries are not counted: the fused kernels of a real run have none, but do not run here;
- bf16 autocast is imitated by casting what convolutions and linear layers take;
- a phase's steps are alike, so each phase makes one step; two main rounds are run, the second being the steady one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dfkd_dist.config import GenerativeSpec, LabelledSpec, Recipe
from dfkd_dist.data.datasets import ImageSet
from dfkd_dist.engine.build import Build, _Builder
from dfkd_dist.engine.live_memory import LiveBytes, storage_bytes
from dfkd_dist.engine.metrics import Meters
from dfkd_dist.engine.no_data import META, without_data
from dfkd_dist.engine.teachers import RANDOM, teacher_cards
from dfkd_dist.models.cards import Card, read_card
from dfkd_dist.models.network import parameter_count
from dfkd_dist.parallel.dry import dry_mesh
from dfkd_dist.parallel.exchange import Exchange, Shapes
from dfkd_dist.parallel.interceptor import Count
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import StopFlag
from dfkd_dist.parallel.topology import Topology
from dfkd_dist.sources.base import Source
from dfkd_dist.sources.generative import GenerativeSource

WARM_UP, MAIN = "warm-up", "main"
"""Kinds of rounds."""


@dataclass(frozen=True)
class Memory:
    """Live tensor bytes of one rank at their peak (a caching allocator needs more; see `engine.live_memory`).

    Args:
        weights: parameters and buffers of all networks held.
        gradients: the players' flat buffers.
        optimizer: optimiser state.
        activations: all else that is alive at the peak: activations, images, answers, receive buffers.
        phases: round kind to phase to the peak within it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        """The most that is alive at any moment of a round."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Trace:
    """What a dry run of one rank found.

    Args:
        memory: at the peak.
        flops: round kind to phase to floating-point operations (a multiply-add is two) of *one* step of the phase, for
            matrix products and convolutions, forward and backward.
        collectives: round kind to collective to what was handed to it, with one step per phase.
        networks: every network held, with its parameters.
    """

    memory: Memory
    flops: dict[str, dict[str, int]]
    collectives: dict[str, dict[str, Count]]
    networks: dict[str, int]


def plan_cards(recipe: Recipe) -> list[Card]:
    """The teachers' cards; where neither weights nor card are there yet, the recipe and defaults must do.

    Raises:
        WeightsError, RecipeError: a teacher's arch is not known: neither given nor on a card.
    """
    teachers = [
        t.model_copy(update={"weights": RANDOM}) if t.arch is not None and not read_card(t.weights) else t
        for t in recipe.teachers
    ]
    return teacher_cards(recipe.model_copy(update={"teachers": teachers}))


def dry_recipe(recipe: Recipe, cards: Sequence[Card]) -> Recipe:
    """The recipe with random teachers, nothing to load, two main rounds and one step per phase."""
    given = ("arch", "size", "channels", "mean", "std", "classes")
    teachers = [
        t.model_copy(update={"weights": RANDOM} | {key: getattr(card, key) for key in given})
        for t, card in zip(recipe.teachers, cards, strict=True)
    ]
    rounds = recipe.rounds.model_copy(
        update={"warmup": min(recipe.rounds.warmup, 1), "main": 2, "student_steps": min(recipe.rounds.student_steps, 1)}
    )
    source = recipe.source
    if isinstance(source, GenerativeSpec) and source.assistant is not None:
        assistant = source.assistant.model_copy(update={"steps": 1, "pretrained": False})
        source = source.model_copy(update={"assistant": assistant})
    student = recipe.student.model_copy(update={"weights": None, "pretrained": False})
    return recipe.model_copy(update={"teachers": teachers, "rounds": rounds, "source": source, "student": student})


def dry_build(
    recipe: Recipe,
    cards: Sequence[Card],
    topology: Topology,
    rank: int,
    shapes: Sequence[Shapes] = (),
    record: Callable[[str, int], None] = lambda name, size: None,
) -> Build:
    """The recipe's objects on one rank, without data; call it inside `without_data`.

    Args:
        recipe: from `dry_recipe`.
        cards: the teachers'.
        topology: the imagined world.
        rank: which rank of it.
        shapes: every teacher's signal shapes, for what other rows would tell; not needed for one row.
        record: told of every collective.
    """
    others = [{k: shapes[k] for k in held} for held in topology.teachers] if shapes else []
    mesh = dry_mesh(topology, rank, recipe.mesh.sync, others, record)
    return _DryBuilder(recipe, META, mesh, list(cards)).build(StopFlag())


def signal_shapes(recipe: Recipe, cards: Sequence[Card], build: Build) -> list[Shapes]:
    """Shapes of all signals of the teachers that a dry build holds."""
    builder = _DryBuilder(recipe, META, build.mesh, list(cards))
    return [builder._shapes(teacher) for teacher in build.teachers]


def trace(recipe: Recipe, cards: Sequence[Card], topology: Topology, rank: int, shapes: Sequence[Shapes] = ()) -> Trace:
    """Run the rounds of a `dry_recipe` as one rank (arguments as `dry_build`)."""
    live, flops, ledger = LiveBytes(), _Flops(), _Ledger()
    with without_data():
        build = dry_build(recipe, cards, topology, rank, shapes, ledger.record)
        meters = _DryMeters(live, flops)
        build.trainer.meters = meters
        ledger.counts.clear()

        def after_round(done: int) -> None:
            kind = WARM_UP if done <= recipe.rounds.warmup else MAIN
            meters.end_round(kind)
            ledger.end_round(kind)

        build.trainer.hooks.after_round = after_round
        with live, flops:
            weights, gradients = adopt_build(live, build)
            for player in players_of(build):
                _hide_temporaries(live, player)
            build.trainer.fit()
        state = storage_bytes(*[player.optimizer for player in players_of(build)])
        peak = max(p for phases in meters.peaks.values() for p in phases.values())
        memory = Memory(weights, gradients, state, peak - weights - gradients - state, meters.peaks)
        return Trace(memory, meters.flops, ledger.rounds, networks_of(build))


def players_of(build: Build) -> list[Player]:
    """Everything that trains on a rank."""
    return [build.trainer.student, *build.source.players]


def adopt_build(live: LiveBytes, build: Build) -> tuple[int, int]:
    """Count what exists before the first round: bytes of weights, and of gradients. Optimiser state comes later."""
    teachers = [kit.teacher for kit in build.source.kits] if isinstance(build.source, GenerativeSource) else []
    modules = [*teachers, *build.teachers, *[player.module for player in players_of(build)]]
    weights = live.adopt(*[[*module.parameters(), *module.buffers()] for module in modules])
    return weights, live.adopt(*[player.gradient for player in players_of(build)])


def networks_of(build: Build) -> dict[str, int]:
    """Name to parameters of every network that a rank holds."""
    found: dict[str, int] = {}
    if isinstance(build.source, GenerativeSource):
        for kit in build.source.kits:
            found[f"teacher/{kit.teacher.name}"] = parameter_count(kit.teacher)
            found[f"teacher/{kit.teacher.name} (answering copy)"] = parameter_count(kit.answering)
    return found | {player.name: parameter_count(player.module) for player in players_of(build)}


# ------------------------------------------------------------------------------------------------ instruments


class _DryMeters(Meters):
    """Peak memory and FLOPs of every phase instead of its seconds."""

    def __init__(self, live: LiveBytes, flops: _Flops) -> None:
        super().__init__(META)
        self._live, self._flops = live, flops
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops: dict[str, dict[str, int]] = {}
        self._now: tuple[dict[str, int], dict[str, int]] = ({}, {})

    @contextmanager
    def time(self, phase: str, images: int = 0) -> Iterator[None]:
        """Measure what is inside."""
        before = self._flops.total
        self._live.reset_peak()
        yield
        peaks, flops = self._now
        peaks[phase] = max(peaks.get(phase, 0), self._live.peak)
        flops[phase] = flops.get(phase, 0) + self._flops.total - before

    def end_round(self, kind: str) -> None:
        """Keep the latest round of each kind, and the higher of the peaks."""
        peaks, self.flops[kind] = self._now
        old = self.peaks.setdefault(kind, {})
        old.update({phase: max(peak, old.get(phase, 0)) for phase, peak in peaks.items()})
        self._now = ({}, {})


class _Flops(TorchDispatchMode):
    """Counts by torch's own table of formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class _Ledger:
    """What the dry groups were told to send."""

    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    rounds: dict[str, dict[str, Count]] = field(default_factory=dict)

    def record(self, name: str, size: int) -> None:
        self.counts[name] += Count(1, size)

    def end_round(self, kind: str) -> None:
        self.rounds[kind] = dict(self.counts)
        self.counts.clear()


def _hide_temporaries(live: LiveBytes, player: Player) -> None:
    """The plain implementation stands in for the fused one, which refuses tensors without data; its state counts."""
    optimizer, step = player.optimizer, player.optimizer.step
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with live.paused():
            out = step(*args, **kwargs)
        live.adopt(optimizer)
        return out

    optimizer.step = unseen  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------- what data would be needed for


class _DryAutocast(TorchFunctionMode):
    """bf16 for what convolutions and linear layers take; torch has no autocast for tensors without data."""

    _LOW = (torch.conv2d, torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._LOW:
            args = [a.bfloat16() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args]
        return func(*args, **(kwargs or {}))


class _StandIn(ImageSet):
    """A labelled set of which only shapes are known."""

    def __init__(self, count: int, classes: int, size: int, channels: int) -> None:
        labels_N = torch.zeros(count, dtype=torch.int64)
        super().__init__(labels_N, [str(c) for c in range(classes)], size=size, channels=channels)

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return torch.zeros(len(indices), self.channels, self.size, self.size, dtype=torch.uint8)


class _DryBuilder(_Builder):
    """The builder of real runs, but for what data and autocast need."""

    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """The imitation."""
        return _DryAutocast if self.recipe.precision.train == "bf16" else nullcontext

    def _source(self, pairs: Any, shapes: Sequence[Shapes], exchange: Exchange, student_card: Card) -> Source:
        spec = self.recipe.source
        if not isinstance(spec, LabelledSpec):
            return super()._source(pairs, shapes, exchange, student_card)
        # The whole set, whatever the party's share: a step takes the same number of images.
        images = _StandIn(self.recipe.batch, self.recipe.num_classes, spec.dataset.size, spec.dataset.channels)
        return self._labelled(spec.model_copy(update={"split": None, "party": None}), images)
