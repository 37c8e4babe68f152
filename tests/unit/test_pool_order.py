"""Passes over a pool: every image once in each, in orders of their own, whoever asks for which places."""

import torch

from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.pool_order import PoolOrder


def order(purpose: str = "p", owner: str = "") -> PoolOrder:
    return PoolOrder(Randomness(3), purpose, owner)


def test_a_pass_has_every_image_once() -> None:
    found = order().at(torch.arange(21), 7, round=2).view(3, 7)
    assert found.sort(dim=1).values.tolist() == [list(range(7))] * 3
    assert len({tuple(row.tolist()) for row in found}) == 3


def test_places_may_be_asked_for_in_any_order_and_part() -> None:
    whole = order().at(torch.arange(40), 7, round=1)
    places = torch.tensor([39, 0, 13, 14, 20, 6, 7])
    one = order()
    assert torch.equal(one.at(places, 7, round=1), whole[places])
    assert torch.equal(torch.cat([one.at(torch.arange(s, s + 8), 7, round=1) for s in range(0, 40, 8)]), whole)


def test_rounds_purposes_owners_and_sizes_have_orders_of_their_own() -> None:
    places = torch.arange(9)
    found = [
        order().at(places, 9, round=0),
        order().at(places, 9, round=1),
        order("q").at(places, 9, round=0),
        order(owner="t1").at(places, 9, round=0),
        order().at(places, 10, round=0),
    ]
    assert len({tuple(row.tolist()) for row in found}) == len(found)
    assert len(order().at(places[:0], 9, round=0)) == 0
