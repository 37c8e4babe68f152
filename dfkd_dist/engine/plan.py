"""What a recipe costs on so many ranks, before any of them exists: mesh, parameters, FLOPs, memory, traffic.

Ranks that do the same work are one *role*; one rank of each role is run without data (`engine.plan_trace`). Nothing is
allocated, so a thousand ranks take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dfkd_dist.config import GenerativeSpec, InversionSpec, MosaicSpec, Recipe, StreamSpec
from dfkd_dist.data.stream.sets import open_set
from dfkd_dist.engine.no_data import without_data
from dfkd_dist.engine.plan_trace import (
    MAIN,
    WARM_UP,
    Memory,
    Trace,
    Traffic,
    dry_build,
    dry_recipe,
    plan_cards,
    signal_shapes,
    trace,
)
from dfkd_dist.engine.teachers import teacher_costs
from dfkd_dist.models.cards import Card
from dfkd_dist.parallel.exchange import Deal, Shapes
from dfkd_dist.parallel.topology import Topology, make_topology, share

NOTES = (
    "A main round is one after the first. Rounds that are observed, evaluated or saved cost more.",
    "Memory is live tensor bytes at the peak; a caching allocator (CUDA) and kernels' workspaces need more.",
    "FLOPs are those of matrix products and convolutions, forward and backward; a multiply-add is two.",
    "Bytes are what a rank hands to a collective; a gather also receives that much from every other member.",
)


@dataclass(frozen=True)
class Role:
    """Ranks that do the same work.

    Args:
        members: these ranks.
        row: their row of the mesh.
        teachers: names of the row's teachers.
        update_images: this rank's images of a generator's, assistant's or synthesis' step (per teacher).
        student_images: this rank's images of a student step.
        networks: every network held, with its parameters.
        flops: round kind to phase to floating-point operations in a round.
        memory: at the peak.
        traffic: round kind to what is handed to collectives in a round.
    """

    members: tuple[int, ...]
    row: int
    teachers: list[str]
    update_images: int
    student_images: int
    networks: dict[str, int]
    flops: dict[str, dict[str, int]]
    memory: Memory
    traffic: dict[str, list[Traffic]]

    @property
    def rank(self) -> int:
        """The first of them, which was looked at."""
        return self.members[0]

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.members)

    def total_flops(self, kind: str = MAIN) -> int:
        """Of one round."""
        return sum(self.flops[kind].values())

    def total_bytes(self, kind: str = MAIN) -> int:
        """Handed to collectives in one round."""
        return sum(t.bytes for t in self.traffic[kind])


@dataclass(frozen=True)
class Plan:
    """What `dfkd plan` prints.

    Args:
        name: the recipe's.
        method: the recipe's.
        ranks: how many.
        rows: the teachers' names of every row of the mesh.
        columns: replicas of each row.
        rounds: round kind to how many of them the recipe has.
        roles: by first rank.
        seconds: round kind to seconds of arithmetic in a round of the busiest role; empty where no rate is known.
        notes: what the figures leave out, and warnings.
    """

    name: str
    method: str
    ranks: int
    rows: list[list[str]]
    columns: int
    rounds: dict[str, int]
    roles: list[Role]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def role_of(self, rank: int) -> Role:
        """The role of a rank."""
        return next(role for role in self.roles if rank in role.members)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for `json.dumps`; of a role's ranks the first and their number."""
        content: dict[str, Any] = asdict(self)
        for role, found in zip(self.roles, content["roles"], strict=True):
            del found["members"]
            found.update(rank=role.rank, ranks=role.ranks)
            found["memory"]["peak"] = role.memory.peak
        return content

    def table(self) -> str:
        """All of it, for reading."""
        from dfkd_dist.engine.plan_table import table

        return table(self)


def plan(recipe: Recipe, ranks: int, flops_per_second: float | None = None) -> Plan:
    """What the recipe costs on so many ranks. Weights files need not exist where the recipe gives a teacher's `arch`.

    Args:
        recipe: what is to run.
        ranks: W.
        flops_per_second: of one rank, for an estimate of time (see `engine.plan_probe`); None gives none.

    Raises:
        WeightsError, RecipeError: a teacher's arch is not known: neither given nor on a card.
        ValueError: fewer than one rank, or `mesh.rows` does not fit the ranks.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; allowed: 1 or more")
    return _Planner(recipe, ranks).plan(flops_per_second)


class _Planner:
    def __init__(self, recipe: Recipe, ranks: int) -> None:
        self.recipe, self.cards = recipe, plan_cards(recipe)
        self.topology = make_topology(ranks, teacher_costs(self.cards), recipe.mesh.rows)
        self.dry = dry_recipe(recipe, self.cards)
        self.kinds = ([WARM_UP] if recipe.rounds.warmup else []) + [MAIN]
        self._traces: dict[Any, Trace] = {}
        self.shapes = self._all_shapes()

    def plan(self, rate: float | None) -> Plan:
        topology, names = self.topology, [t.name for t in self.recipe.teachers]
        roles = [self._role(same) for same in self._same_work()]
        rounds = {WARM_UP: self.recipe.rounds.warmup, MAIN: self.recipe.rounds.main}
        return Plan(
            self.recipe.name,
            self.recipe.method,
            topology.world_size,
            [[names[k] for k in row] for row in topology.teachers],
            topology.columns,
            {kind: rounds[kind] for kind in self.kinds},
            roles,
            {kind: max(r.total_flops(kind) for r in roles) / rate for kind in self.kinds} if rate else {},
            [*NOTES, *self._warnings(roles)],
        )

    def _all_shapes(self) -> list[Shapes]:
        """Signal shapes of every teacher of the run, from one imagined rank that holds them all."""
        alone = Topology(1, 1, (tuple(range(len(self.cards))),))
        dry = self.dry.model_copy(update={"mesh": self.dry.mesh.model_copy(update={"rows": None})})
        with without_data():
            return signal_shapes(dry, self.cards, dry_build(dry, self.cards, alone, 0))

    def _same_work(self) -> list[list[int]]:
        """Ranks, by role."""
        roles: dict[Any, list[int]] = {}
        for rank in range(self.topology.world_size):
            roles.setdefault((self.topology.row_of(rank), self._work(rank)), []).append(rank)
        return list(roles.values())

    def _work(self, rank: int) -> tuple[Any, ...]:
        """What sets the sizes of a rank's tensors, besides its row's networks."""
        topology, batch, source = self.topology, self.recipe.batch, self.recipe.source
        if isinstance(source, InversionSpec):
            made_here = share(source.per_round(batch), topology.columns, topology.column_of(rank))
            return made_here, (), share(batch, topology.world_size, rank)
        if not isinstance(source, GenerativeSpec):
            return (share(batch, topology.world_size, rank),)
        column = topology.column_of(rank)
        deal = Deal(topology, column, batch // len(self.cards))
        held = topology.teachers[topology.row_of(rank)]
        made = tuple(deal.made(k) for k in held)
        beside = share(source.ood_batch, topology.world_size, rank) if isinstance(source, MosaicSpec) else 0
        taken = deal.dealt(topology.row_of(rank)) + beside
        return share(batch, topology.columns, column), made, taken, beside, deal.total, deal.padded

    def _role(self, ranks: Sequence[int]) -> Role:
        rank, work, made = (
            ranks[0],
            self._work(ranks[0]),
            isinstance(self.recipe.source, GenerativeSpec | InversionSpec),
        )
        row = self.topology.row_of(rank)
        held = self.topology.teachers[row]
        kind = tuple(_build_of(self.cards[k]) for k in held)
        if (kind, work) not in self._traces:
            self._traces[kind, work] = trace(self.dry, self.cards, self.topology, rank, self.shapes)
        found = self._traces[kind, work]
        return Role(
            tuple(ranks),
            row,
            [self.recipe.teachers[k].name for k in held],
            work[0] if made else 0,
            work[2] if made else work[0],
            found.networks,
            {kind: self._per_round(found.flops.get(kind, {})) for kind in self.kinds},
            found.memory,
            {kind: [t.times(self._steps(t.phase)) for t in found.traffic[kind]] for kind in self.kinds},
        )

    def _per_round(self, flops: dict[str, int]) -> dict[str, int]:
        return {phase: count * self._steps(phase) for phase, count in flops.items()}

    def _steps(self, phase: str) -> int:
        """Of a phase in a round; the dry run makes one."""
        source = self.recipe.source
        if phase in ("exchange", "student"):
            return steps_of_an_epoch(self.recipe) or self.recipe.rounds.student_steps  # type: ignore[return-value]
        if phase == "assistant" and isinstance(source, GenerativeSpec | InversionSpec) and source.assistant is not None:
            return source.assistant.steps
        return source.synthesis.phases().get(phase, 1) if isinstance(source, InversionSpec) else 1

    def _warnings(self, roles: Sequence[Role]) -> list[str]:
        found = []
        for what, count in (
            ("generator step", sum(r.ranks for r in roles if r.teachers and r.update_images == 0)),
            ("student step", sum(r.ranks for r in roles if r.student_images == 0)),
        ):
            if count:
                batch = self.recipe.batch
                found.append(f"WARNING: batch is {batch}: {count} of the ranks have no image in a {what}.")
        return found


def _build_of(card: Card) -> tuple[Any, ...]:
    """What sets the sizes of a teacher's tensors."""
    return card.arch, card.num_classes, card.size, card.channels, card.classes is None


def steps_of_an_epoch(recipe: Recipe) -> int | None:
    """Student steps of a round that is one pass over a stream, as its manifest has it; None for a fixed number.

    A selection whose size is not in the recipe counts as the whole stream.

    Raises:
        DatasetError: the shards' manifest cannot be read.
    """
    if recipe.rounds.student_steps != "epoch" or not isinstance(recipe.source, StreamSpec):
        return None
    manifest = open_set(recipe.source.reader)
    held = len(manifest) if manifest.held_N is None else int(manifest.held_N.sum())
    samples = int(held * recipe.source.reader.fraction)
    selection = recipe.source.selection
    if selection is not None and selection.count is not None:
        samples = min(samples, selection.count)
    return max(1, samples // recipe.batch)
