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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dfkd_dist.config import (
    AugmentSpec,
    DatasetSpec,
    GenerativeSpec,
    InversionSpec,
    LabelledSpec,
    MosaicSpec,
    Recipe,
    StreamSpec,
)
from dfkd_dist.data.datasets import ImageSet
from dfkd_dist.data.pool import Pool
from dfkd_dist.data.stream.batch import RawBatch
from dfkd_dist.engine.build import Build, _Builder
from dfkd_dist.engine.build_inversion import dry_pool, shortened
from dfkd_dist.engine.build_mosaic import RealImages
from dfkd_dist.engine.live_memory import LiveBytes, storage_bytes
from dfkd_dist.engine.metrics import Meters
from dfkd_dist.engine.no_data import META, without_data
from dfkd_dist.engine.teachers import RANDOM, teacher_cards
from dfkd_dist.models.cards import Card, read_card
from dfkd_dist.models.network import parameter_count
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.dry import Record, Sent, dry_mesh
from dfkd_dist.parallel.exchange import Exchange, Shapes
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.interceptor import Count
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.stopping import StopFlag
from dfkd_dist.parallel.topology import Topology, bounds
from dfkd_dist.sources.base import Source
from dfkd_dist.sources.generative import GenerativeSource
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.stream import StreamReader, StreamSource
from dfkd_dist.sources.views import make_views

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
class Traffic:
    """What one rank hands to collectives of one kind among one group, in one phase of a round.

    Payload is counted as `parallel.interceptor` counts it. Outside a round, and therefore not here: Python objects
    gathered while a run is built, logged, evaluated or saved, and the extra passes of a round that is observed.

    Args:
        phase: as the trainer's meters call it.
        kind: the collective's name in torch.distributed.
        group: `row`, `column` or `world`.
        members: ranks in that group.
        calls: how many.
        bytes: of all calls together.
    """

    phase: str
    kind: str
    group: str
    members: int
    calls: int
    bytes: int

    def times(self, steps: int) -> Traffic:
        """The same for a phase of so many steps."""
        return replace(self, calls=self.calls * steps, bytes=self.bytes * steps)


def by_collective(sent: Sequence[Traffic]) -> dict[str, Count]:
    """Calls and bytes of each collective, as the interceptor counts them."""
    found: dict[str, Count] = {}
    for t in sent:
        found[t.kind] = found.get(t.kind, Count()) + Count(t.calls, t.bytes)
    return found


@dataclass(frozen=True)
class Trace:
    """What a dry run of one rank found.

    Args:
        memory: at the peak.
        flops: round kind to phase to floating-point operations (a multiply-add is two) of *one* step of the phase, for
            matrix products and convolutions, forward and backward.
        traffic: round kind to what was handed to collectives, with one step per phase.
        networks: every network held, with its parameters.
    """

    memory: Memory
    flops: dict[str, dict[str, int]]
    traffic: dict[str, list[Traffic]]
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
    """The recipe with random teachers, nothing to load or to score, two main rounds and one step per phase."""
    given = ("arch", "size", "channels", "mean", "std", "classes")
    teachers = [
        t.model_copy(update={"weights": RANDOM} | {key: getattr(card, key) for key in given})
        for t, card in zip(recipe.teachers, cards, strict=True)
    ]
    rounds = recipe.rounds.model_copy(update={"warmup": min(recipe.rounds.warmup, 1), "main": 2, "student_steps": 1})
    source = recipe.source
    if isinstance(source, GenerativeSpec) and source.assistant is not None:
        assistant = source.assistant.model_copy(update={"steps": 1, "pretrained": False})
        source = source.model_copy(update={"assistant": assistant})
    if isinstance(source, StreamSpec | MosaicSpec):
        source = source.model_copy(update={"selection": None})
    if isinstance(source, InversionSpec):
        source = shortened(recipe, source)
    student = recipe.student.model_copy(update={"weights": None, "pretrained": False})
    return recipe.model_copy(update={"teachers": teachers, "rounds": rounds, "source": source, "student": student})


def dry_build(
    recipe: Recipe,
    cards: Sequence[Card],
    topology: Topology,
    rank: int,
    shapes: Sequence[Shapes] = (),
    record: Record = lambda sent: None,
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
    live, flops = LiveBytes(), _Flops()
    meters = _DryMeters(live, flops)
    with without_data():
        build = dry_build(recipe, cards, topology, rank, shapes, meters.record)
        build.trainer.meters = meters
        meters.sent.clear()

        def after_round(done: int) -> None:
            kind = WARM_UP if done <= recipe.rounds.warmup else MAIN
            meters.end_round(kind)

        build.trainer.hooks.after_round = after_round
        with live, flops:
            weights, gradients = adopt_build(live, build)
            for player in players_of(build):
                _hide_temporaries(live, player)
            build.trainer.fit()
        state = storage_bytes(*[player.optimizer for player in players_of(build)])
        peak = max(p for phases in meters.peaks.values() for p in phases.values())
        memory = Memory(weights, gradients, state, peak - weights - gradients - state, meters.peaks)
        return Trace(memory, meters.flops, meters.traffic, networks_of(build))


def players_of(build: Build) -> list[Player]:
    """Everything that trains on a rank."""
    return [build.trainer.student, *build.source.players]


def adopt_build(live: LiveBytes, build: Build) -> tuple[int, int]:
    """Count what exists before the first round: bytes of weights, and of gradients. Optimiser state comes later."""
    sealed = [teacher for teacher, _ in _sealed(build)]
    modules = [*sealed, *build.teachers, *[player.module for player in players_of(build)]]
    weights = live.adopt(*[[*module.parameters(), *module.buffers()] for module in modules])
    return weights, live.adopt(*[player.gradient for player in players_of(build)])


def networks_of(build: Build) -> dict[str, int]:
    """Name to parameters of every network that a rank holds."""
    found: dict[str, int] = {}
    for teacher, answering in _sealed(build):
        found[f"teacher/{teacher.name}"] = parameter_count(teacher)
        found[f"teacher/{teacher.name} (answering copy)"] = parameter_count(answering)
    return found | {player.name: parameter_count(player.module) for player in players_of(build)}


def _sealed(build: Build) -> list[tuple[Teacher, Teacher]]:
    """Teachers through which a rank takes gradients to images, each with its answering copy."""
    if isinstance(build.source, GenerativeSource):
        return [(kit.teacher, kit.answering) for kit in build.source.kits]
    if isinstance(build.source, InversionSource):
        sealed = [synthesiser.bench.teacher for synthesiser in build.source.synthesisers]
        return list(zip(sealed, build.teachers, strict=True))
    return []


# ------------------------------------------------------------------------------------------------ instruments


class _DryMeters(Meters):
    """Peak memory, FLOPs and traffic of every phase instead of its seconds."""

    def __init__(self, live: LiveBytes, flops: _Flops) -> None:
        super().__init__(META)
        self._live, self._flops = live, flops
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops: dict[str, dict[str, int]] = {}
        self.traffic: dict[str, list[Traffic]] = {}
        self.sent: dict[tuple[str, Sent], int] = defaultdict(int)
        self._now: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._phase = ""

    def record(self, sent: Sent) -> None:
        """A dry group was told to send."""
        self.sent[self._phase, sent] += 1

    @contextmanager
    def time(self, phase: str, images: int = 0) -> Iterator[None]:
        """Measure what is inside."""
        before, outer, self._phase = self._flops.total, self._phase, phase
        self._live.reset_peak()
        yield
        self._phase = outer
        peaks, flops = self._now
        peaks[phase] = max(peaks.get(phase, 0), self._live.peak)
        flops[phase] = flops.get(phase, 0) + self._flops.total - before

    def end_round(self, kind: str) -> None:
        """Keep the latest round of each kind, and the higher of the peaks."""
        peaks, self.flops[kind] = self._now
        old = self.peaks.setdefault(kind, {})
        old.update({phase: max(peak, old.get(phase, 0)) for phase, peak in peaks.items()})
        self._now = ({}, {})
        self.traffic[kind] = self._traffic()
        self.sent.clear()

    def _traffic(self) -> list[Traffic]:
        """Calls of unequal sizes among the same ranks are one entry."""
        counts: dict[tuple[str, str, str, int], Count] = defaultdict(Count)
        for (phase, sent), calls in self.sent.items():
            counts[phase, sent.kind, sent.group, sent.members] += Count(calls, calls * sent.bytes)
        return [Traffic(*where, count.calls, count.bytes) for where, count in counts.items()]


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

    def __init__(self, count: int, classes: int, spec: DatasetSpec) -> None:
        labels_N = torch.zeros(count, dtype=torch.int64)
        super().__init__(labels_N, [str(c) for c in range(classes)], size=spec.size, channels=spec.channels)
        self.of_pixels = spec.of_pixels

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return torch.zeros(len(indices), self.channels, self.size, self.size, dtype=torch.uint8)

    def labels(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        sides = (self.size, self.size) if self.of_pixels else ()
        return torch.zeros(len(indices), *sides, dtype=torch.int64)


class _DryBuilder(_Builder):
    """The builder of real runs, but for what data and autocast need."""

    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """The imitation."""
        return _DryAutocast if self.recipe.precision.train == "bf16" else nullcontext

    def _source(self, pairs: Any, shapes: Sequence[Shapes], exchange: Exchange, student_card: Card) -> Source:
        spec = self.recipe.source
        if isinstance(spec, LabelledSpec):
            # The whole set, whatever the party's share: a step takes the same number of images.
            images = _StandIn(self.recipe.batch, self.recipe.num_classes, spec.dataset)
            whole = spec.model_copy(update={"split": None, "party": None})
            return self._labelled(whole, images, exchange if self.recipe.teachers else None)
        if isinstance(spec, StreamSpec):
            reader = self._reader(self.recipe.batch, self.mesh.world, self.recipe.augment)
            maker = make_views(self.recipe.objective, self.mesh.sync_world, self.randomness, self.recipe.batch)
            return StreamSource(reader, None, exchange, None, maker)
        return super()._source(pairs, shapes, exchange, student_card)

    def _pool(self, spec: InversionSpec) -> Pool:
        return dry_pool(self.recipe, spec, self.device)

    def _real_images(self, spec: MosaicSpec, exchange: Exchange) -> RealImages:
        """Of the same shapes; a selection's steps are not counted."""
        patches = self._reader(self.recipe.batch, self.mesh.row, None) if spec.discriminator is not None else None
        beside = self._reader(spec.ood_batch, self.mesh.world, spec.ood_augment) if spec.ood_batch else None
        return RealImages(patches, beside)

    def _reader(self, batch: int, group: Group, augment: AugmentSpec | None) -> StreamReader:
        image = self.recipe.image
        stream = _DryStream(batch, group.rank, group.size, image.size, image.channels)
        return StreamReader(stream, batch, group, self.randomness, augment, self.dtype, self.device)  # type: ignore[arg-type]


class _DryStream:
    """A stream of which only shapes are known: every image can be read."""

    batches = 1

    def __init__(self, batch: int, rank: int, world_size: int, size: int, channels: int) -> None:
        self.low, self.high = bounds(batch, world_size, rank)
        self.size, self.channels = size, channels

    def get(self, epoch: int, g: int) -> RawBatch:
        """This rank's slots of any batch."""
        count = self.high - self.low
        images_NCHW = torch.zeros(count, self.channels, self.size, self.size, dtype=torch.uint8)
        slots_N, unknown_N = torch.arange(self.low, self.high), torch.zeros(count, dtype=torch.int64)
        return RawBatch(images_NCHW, torch.ones(count, dtype=torch.bool), slots_N, slots_N, unknown_N, bad=())
