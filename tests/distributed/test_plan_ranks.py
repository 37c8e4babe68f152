"""The plan against real ranks: bytes as counted in front of torch.distributed, and live bytes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dfkd_dist.engine.build import build
from dfkd_dist.engine.live_memory import LiveBytes
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_trace import MAIN, WARM_UP, adopt_build, by_collective
from dfkd_dist.parallel.interceptor import Count, Interceptor, payload_bytes
from tests.distributed.harness import run_ranks
from tests.unit.test_plan import CPU, PeakMeters, dafl, dfmf, dfq_adv, recipe

pytestmark = pytest.mark.distributed


def _run(rank: int, size: int, contents: list[dict[str, Any]]) -> list[tuple[list[dict[str, Count]], int]]:
    """For each recipe: what the interceptor saw in every round, and the peak of live bytes."""
    return [_measured(content, size) for content in contents]


def _measured(content: dict[str, Any], size: int) -> tuple[list[dict[str, Count]], int]:
    built, live = build(recipe(content), CPU, size), LiveBytes()
    built.trainer.meters = meters = PeakMeters(live)
    rounds: list[dict[str, Count]] = []
    with Interceptor() as seen, live:
        adopt_build(live, built)
        built.trainer.hooks.after_round = lambda done: rounds.append(seen.take())
        built.trainer.fit()
    return rounds, meters.peak


CASES = {
    2: [dfmf(2), dfq_adv(2), dfmf(2, mesh={"rows": 1}), dafl(1)],
    3: [dfmf(3, batch=25), dfq_adv(2), dfmf(2, mesh={"sync": "local"})],
    4: [dfmf(3), dfmf(2), dfq_adv(2, batch=27), dfq_adv(3)],
}


@pytest.mark.parametrize("size", CASES)
def test_bytes_and_memory_are_those_of_real_ranks(size: int) -> None:
    reports = run_ranks(_run, size, CASES[size], timeout=240)
    for i, content in enumerate(CASES[size]):
        planned = plan(recipe(content), size)
        for rank, report in enumerate(reports):
            rounds, peak = report[i]
            role = planned.role_of(rank)
            sent = {kind: by_collective(traffic) for kind, traffic in role.traffic.items()}
            assert sent[MAIN] == rounds[-1], (content["method"], rank)
            assert sent.get(WARM_UP, rounds[0]) == rounds[0], (content["method"], rank)
            assert sent[MAIN]["all_reduce"].bytes > 0
            assert role.memory.peak == pytest.approx(peak, rel=0.01), (content["method"], rank)


def test_unequal_rows_send_unequal_bytes() -> None:
    """Otherwise the comparison above could not tell rows apart."""
    two, one = plan(recipe(dfmf(3)), 4).roles
    assert (len(two.teachers), len(one.teachers)) == (2, 1)
    assert two.total_bytes() > one.total_bytes() and two.memory.peak > one.memory.peak


def _collectives(rank: int, size: int) -> dict[str, Count]:
    original = dist.all_reduce
    with Interceptor() as seen:
        dist.all_reduce(torch.zeros(10))
        dist.all_reduce(tensor=torch.zeros(3, dtype=torch.float64), op=dist.ReduceOp.MAX)
        dist.all_gather_into_tensor(torch.zeros(4 * size), torch.zeros(4))
        dist.all_to_all_single(torch.zeros(6 * size), torch.zeros(6 * size), [6] * size, [6] * size)
        dist.broadcast(torch.zeros(5, dtype=torch.uint8), src=0)
        dist.all_gather_object([None] * size, {"rank": rank})
        dist.barrier()
        found = seen.take()
        assert seen.counts == {}
    assert dist.all_reduce is original
    dist.all_reduce(torch.zeros(10))
    assert seen.counts == {}
    return found


def test_the_interceptor_counts_what_is_handed_in() -> None:
    for rank, found in enumerate(run_ranks(_collectives, 2)):
        assert found == {
            "all_reduce": Count(2, 40 + 24),
            "all_gather_into_tensor": Count(1, 16),
            "all_to_all_single": Count(1, 48),
            "broadcast": Count(1, 5),
            "all_gather_object": Count(1, payload_bytes({"rank": rank})),
            "barrier": Count(1, 0),
        }
