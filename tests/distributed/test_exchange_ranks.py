"""Images out and answers back: the arithmetic against a simulation in plain Python, and the wire on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.models.signals import LOGITS, MAP, Need, Signals
from dfkd_dist.parallel.exchange import Deal, Exchange, Shapes
from dfkd_dist.parallel.mesh import make_mesh
from dfkd_dist.parallel.topology import bounds, make_topology
from tests.distributed.harness import run_ranks

WORLDS = [(world, count) for world in range(1, 7) for count in range(1, 6)]


def _image(teacher: int, index: int) -> float:
    """What the image says about itself: whose it is and its global index."""
    return 1000.0 * teacher + index


def _simulate(world: int, costs: list[float], each: int) -> dict[int, list[float]]:
    """Which images each rank's student gets: walk over columns, teachers and indices, dealing one at a time."""
    topology = make_topology(world, costs)
    hands: dict[int, list[float]] = {rank: [] for rank in range(world)}
    for column in range(topology.columns):
        low, high = bounds(each, topology.columns, column)
        rows = topology.column_ranks(column)
        position = 0
        for teacher in range(len(costs)):
            for index in range(low, high):
                hands[rows[position % len(rows)]].append(_image(teacher, index))
                position += 1
    return hands


@pytest.mark.parametrize(("world", "count"), WORLDS)
@pytest.mark.parametrize("each", [1, 2, 5, 8])
def test_the_deal_as_simulated(world: int, count: int, each: int) -> None:
    costs = [1.0 + k % 2 for k in range(count)]
    topology, hands = make_topology(world, costs), _simulate(world, costs, each)
    seen: list[float] = []
    for column in range(topology.columns):
        deal = Deal(topology, column, each)
        low, high = bounds(each, topology.columns, column)
        blocks: list[float | None] = []
        for row in range(topology.rows):
            block: list[float | None] = [_image(k, i) for k in topology.teachers[row] for i in range(low, high)]
            assert len(block) == deal.row_total(row)
            blocks += block + [None] * (deal.padded - len(block))
        ordered = [blocks[place] for place in deal.order()]
        assert len(ordered) == deal.total
        for row in range(topology.rows):
            hand = hands[topology.column_ranks(column)[row]]
            assert ordered[row :: topology.rows] == hand and len(hand) == deal.dealt(row)
            seen += hand
    assert sorted(seen) == sorted(_image(k, i) for k in range(count) for i in range(each))


@pytest.mark.parametrize(("world", "count"), WORLDS)
def test_students_of_a_column_get_equal_shares_of_every_generator(world: int, count: int) -> None:
    topology, hands = make_topology(world, [1.0] * count), _simulate(world, [1.0] * count, each=12)
    for column in range(topology.columns):
        members = topology.column_ranks(column)
        lengths = [len(hands[rank]) for rank in members]
        assert max(lengths) - min(lengths) <= 1
        for teacher in range(count):
            own = [sum(value // 1000 == teacher for value in hands[rank]) for rank in members]
            assert max(own) - min(own) <= 1


# ------------------------------------------------------------------------------------------------ ranks


class _Echo:
    """A teacher whose answers can be recomputed from the image alone."""

    def __init__(self, index: int, shapes: Shapes) -> None:
        self.index, self.shapes = index, shapes

    def __call__(self, images_NCHW: Tensor, need: Need) -> Signals:
        value_N = images_NCHW[:, 0, 0, 0]
        said = {name: self._say(value_N, shape) for name, shape in self.shapes.items() if name in need}
        return Signals(said[LOGITS], map_NDHW=said.get(MAP))

    def _say(self, value_N: Tensor, shape: tuple[int, ...]) -> Tensor:
        ramp = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=value_N.dtype).view(shape)
        return (10.0**6) * (self.index + 1) + value_N.view(-1, *[1] * len(shape)) + ramp / 1024


def _shapes(count: int) -> list[Shapes]:
    return [{LOGITS: (3,), MAP: (2 + k, 1 + k % 2, 2)} for k in range(count)]


def _exchange(rank: int, size: int, costs: list[float], each: int, with_map: bool) -> dict[str, Any]:
    mesh = make_mesh(make_topology(size, costs), torch.device("cpu"))
    need: Need = frozenset({LOGITS, MAP}) if with_map else frozenset({LOGITS})
    shapes = _shapes(len(costs))
    teachers = [_Echo(k, shapes[k]) for k in mesh.teachers]
    exchange = Exchange(mesh, teachers, shapes, need)
    low, high = bounds(each, mesh.row.size, mesh.row.rank)
    own = [torch.tensor([_image(k, i) for i in range(low, high)]).double() for k in mesh.teachers]
    batch = exchange.gather([o.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) for o in own], each)
    answers = exchange.answers(batch)
    expected = [_Echo(k, shapes[k])(batch.images_NCHW, need) for k in range(len(costs))]
    right = [
        torch.equal(found.logits_NC, wanted.logits_NC)
        and (found.map_NDHW is None if not with_map else torch.equal(found.map_NDHW, wanted.map_NDHW))  # type: ignore
        for found, wanted in zip(answers, expected, strict=True)
    ]
    return {"right": right, "images": batch.images_NCHW[:, 0, 0, 0].tolist(), "count": batch.count}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "costs", "each"),
    [
        (2, [1.0, 1.0, 9.0], 5),  # unequal rows
        (3, [1.0, 2.0, 3.0], 3),
        (4, [3.0, 1.0, 1.0, 1.0, 1.0], 3),  # rows of one and of four teachers... on four rows
        (4, [1.0, 1.0], 5),
        (4, [1.0, 2.0, 3.0], 1),  # a column without images
        (3, [1.0, 1.0], 4),  # one row
    ],
)
@pytest.mark.parametrize("with_map", [False, True])
def test_answers_come_home_to_their_images(world: int, costs: list[float], each: int, with_map: bool) -> None:
    told = run_ranks(_exchange, world, costs, each, with_map)
    hands = _simulate(world, costs, each)
    for rank, said in enumerate(told):
        assert said["right"] == [True] * len(costs)
        assert said["images"] == hands[rank]
        assert said["count"] == each * len(costs)
