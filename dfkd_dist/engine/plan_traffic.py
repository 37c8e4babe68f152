"""Bytes that a rank hands to collectives in one round: arithmetic over the topology, the widths and the batch.

Payload is counted as `parallel.interceptor` counts it. Outside a round, and therefore not here: Python objects gathered
while a run is built, logged, evaluated or saved, and the extra passes of a round that is observed for the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dfkd_dist.config import GenerativeSpec, Recipe
from dfkd_dist.parallel.exchange import Deal
from dfkd_dist.parallel.interceptor import Count
from dfkd_dist.parallel.topology import Topology

GATHER, REDUCE, ALL_TO_ALL = "all_gather_into_tensor", "all_reduce", "all_to_all_single"
GENERATOR, ASSISTANT, EXCHANGE, STUDENT = "generator", "assistant", "exchange", "student"
"""Phases of a round, as the trainer's meters call them."""


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to collectives of one kind, for one purpose, over one round.

    Args:
        phase: in which phase of the round.
        what: what the tensors are.
        kind: the collective's name in torch.distributed.
        group: `row`, `column` or `world`.
        members: ranks in that group.
        calls: in a round.
        bytes: in a round, all calls together.
    """

    phase: str
    what: str
    kind: str
    group: str
    members: int
    calls: int
    bytes: int


@dataclass(frozen=True)
class Widths:
    """What the arithmetic needs to know about a trained network.

    Args:
        parameters: numbers in its gradient.
        norms: channels of each synchronised batch norm.
    """

    parameters: int
    norms: tuple[int, ...]


@dataclass(frozen=True)
class TeacherWidths:
    """The same for all that belongs to one teacher.

    Args:
        norms: channels of the teacher's own batch norms (the `bn` term).
        answer: numbers in its answer about one image.
        generator: its generator, where there is one.
        assistant: its assistant with heads, where there is one.
    """

    norms: tuple[int, ...]
    answer: int
    generator: Widths | None = None
    assistant: Widths | None = None


@dataclass(frozen=True)
class _Lane:
    """A group by name and size; a group of one sends nothing."""

    name: str
    members: int

    def send(self, phase: str, what: str, kind: str, sizes: Sequence[int]) -> Iterator[Traffic]:
        if self.members > 1 and sizes:
            yield Traffic(phase, what, kind, self.name, self.members, len(sizes), sum(sizes))


class TrafficPlan:
    """Traffic of any rank of a run.

    Args:
        recipe: what runs.
        topology: on which ranks.
        teachers: one for each teacher, in recipe order.
        student: the student with its heads.
    """

    def __init__(self, recipe: Recipe, topology: Topology, teachers: Sequence[TeacherWidths], student: Widths) -> None:
        self.recipe, self.topology, self.teachers, self.student = recipe, topology, teachers, student
        self.element = 8 if recipe.precision.train == "fp64" else 4
        shared = recipe.mesh.sync == "global"
        self.row, self.column = _Lane("row", topology.columns), _Lane("column", topology.rows)
        self.world = _Lane("world", topology.world_size)
        self.sync = self.row if shared else _Lane("row", 1)
        self.sync_world = self.world if shared else _Lane("world", 1)

    def round(self, rank: int, warm: bool) -> list[Traffic]:
        """One warm-up round, or one main round after the first, as `rank` sees it."""
        found: list[Traffic] = []
        if isinstance(self.recipe.source, GenerativeSpec):
            found += self._updates(self.recipe.source, rank, warm)
        if not warm:
            found += _times(self._student_step(rank), self.recipe.rounds.student_steps)
        return _merged(found)

    def _held(self, rank: int) -> list[TeacherWidths]:
        return [self.teachers[k] for k in self.topology.teachers[self.topology.row_of(rank)]]

    # ------------------------------------------------------------------------------------- inner steps

    def _updates(self, spec: GenerativeSpec, rank: int, warm: bool) -> list[Traffic]:
        if not warm and spec.freeze_after_warmup:
            return []
        found = [t for teacher in self._held(rank) for t in self._generator_step(spec, teacher, warm)]
        found += self._agreement(GENERATOR)
        if not warm and spec.assistant is not None:
            step = [t for teacher in self._held(rank) for t in self._assistant_step(teacher)]
            found += _times([*step, *self._agreement(ASSISTANT)], spec.assistant.steps)
        return found

    def _generator_step(self, spec: GenerativeSpec, teacher: TeacherWidths, warm: bool) -> Iterator[Traffic]:
        assert teacher.generator is not None
        weights = spec.warmup_weights() if warm else spec.loss.weights()
        yield from self._norms(GENERATOR, "generator batch norm", self.sync, teacher.generator.norms, backward=True)
        if weights["adv"] > 0 and spec.adversary.batch_norm == "batch":
            read = self.student if spec.adversary.against == "student" else teacher.assistant
            assert read is not None
            yield from self._norms(GENERATOR, "opponent batch norm", self.sync, read.norms, backward=True)
        if weights["bn"] > 0:
            moments = (2 * sum(teacher.norms) + 1) * self.element
            yield from self.sync.send(GENERATOR, "moments of the bn term", GATHER, [moments])
        if weights["bce"] > 0:
            mean = self.recipe.num_classes * self.element
            yield from self.sync.send(GENERATOR, "class means of the bce term", GATHER, [mean])
        yield from self._gradient(GENERATOR, "generator gradients", self.row, teacher.generator)

    def _assistant_step(self, teacher: TeacherWidths) -> Iterator[Traffic]:
        assert teacher.generator is not None and teacher.assistant is not None
        yield from self._norms(ASSISTANT, "generator batch norm", self.sync, teacher.generator.norms, backward=False)
        yield from self._norms(ASSISTANT, "assistant batch norm", self.sync, teacher.assistant.norms, backward=True)
        yield from self._gradient(ASSISTANT, "assistant gradients", self.row, teacher.assistant)

    # ------------------------------------------------------------------------------------ student's step

    def _student_step(self, rank: int) -> list[Traffic]:
        found: list[Traffic] = []
        if isinstance(self.recipe.source, GenerativeSpec):
            found += self._exchange(self.recipe.source, rank)
        found += self._norms(STUDENT, "student batch norm", self.sync_world, self.student.norms, backward=True)
        found += self._gradient(STUDENT, "student gradients", self.world, self.student)
        return [*found, *self._agreement(STUDENT)]

    def _exchange(self, spec: GenerativeSpec, rank: int) -> Iterator[Traffic]:
        image = self.recipe.image.channels * self.recipe.image.size**2 * self.element
        for teacher in self._held(rank):
            assert teacher.generator is not None
            if spec.student_images == "from_update":
                longest = math.ceil(self.recipe.batch / self.row.members)
                yield from self.row.send(EXCHANGE, "images of the update", GATHER, [longest * image])
            else:
                norms = teacher.generator.norms
                yield from self._norms(EXCHANGE, "generator batch norm", self.sync, norms, backward=False)
        each = self.recipe.batch // len(self.teachers)
        deal = Deal(self.topology, self.topology.column_of(rank), each)
        yield from self.column.send(EXCHANGE, "images out", GATHER, [deal.padded * image])
        answers = deal.total * sum(teacher.answer for teacher in self._held(rank)) * self.element
        yield from self.column.send(EXCHANGE, "answers back", ALL_TO_ALL, [answers])

    # --------------------------------------------------------------------------------------- building blocks

    def _norms(self, phase: str, what: str, lane: _Lane, widths: Sequence[int], *, backward: bool) -> Iterator[Traffic]:
        """Forward gathers mean, variance and count of every layer; backward sums two vectors."""
        yield from lane.send(phase, what, GATHER, [(2 * c + 1) * self.element for c in widths])
        if backward:
            yield from lane.send(phase, what, REDUCE, [2 * c * self.element for c in widths])

    def _gradient(self, phase: str, what: str, lane: _Lane, network: Widths) -> Iterator[Traffic]:
        yield from lane.send(phase, what, REDUCE, [network.parameters * self.element])

    def _agreement(self, phase: str) -> Iterator[Traffic]:
        """Two bytes per step: whether to stop, and whether a loss is not finite."""
        yield from self.world.send(phase, "agreement flags", REDUCE, [2])


def by_collective(sent: Sequence[Traffic]) -> dict[str, Count]:
    """Calls and bytes of each collective, as the interceptor counts them."""
    found: dict[str, Count] = {}
    for t in sent:
        found[t.kind] = found.get(t.kind, Count()) + Count(t.calls, t.bytes)
    return found


def _times(step: Sequence[Traffic], steps: int) -> list[Traffic]:
    return [replace(t, calls=t.calls * steps, bytes=t.bytes * steps) for t in step]


def _merged(found: Sequence[Traffic]) -> list[Traffic]:
    """One entry per purpose and kind: a rank with several teachers does everything several times."""
    merged: dict[tuple[str, str, str], Traffic] = {}
    for t in found:
        key = (t.phase, t.what, t.kind)
        old = merged.get(key)
        merged[key] = t if old is None else replace(t, calls=old.calls + t.calls, bytes=old.bytes + t.bytes)
    return list(merged.values())
