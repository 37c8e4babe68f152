"""Stopping and failing with real processes: killed and frozen ranks are named, a signal to one stops all."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.launch import LaunchError, join, join_at, launch_facts, leave
from dfkd_dist.parallel.stopping import EXIT_LOST_RANK, Heartbeats, StopFlag, agree
from tests.distributed.harness import Rank, RanksFailed, run_ranks, start_ranks

LIMIT_S = 20.0
READY = "every rank is here"


def _group(rank: int, size: int) -> Group:
    return Group(tuple(range(size)), rank, dist.group.WORLD)


def _reduce_forever(rank: int, size: int) -> None:
    with Heartbeats(launch_facts()) as heartbeats:
        try:
            dist.all_reduce(torch.ones(1))
            print(READY, file=sys.stderr, flush=True)
            while True:
                dist.all_reduce(torch.ones(1))
                time.sleep(0.05)
        except RuntimeError as error:
            print(heartbeats.explain(error), file=sys.stderr, flush=True)
            sys.exit(EXIT_LOST_RANK)


def _stop_when_told(rank: int, size: int) -> tuple[int, str | None]:
    group, step = _group(rank, size), 0
    with Heartbeats(launch_facts()), StopFlag() as flag:
        while not agree(group, stop=flag.signal is not None, failed=False).stop:
            step += 1
            if step == 20 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002)
    return step, flag.signal


def _agree_on_failure(rank: int, size: int) -> list[bool]:
    answers = [agree(_group(rank, size), stop=False, failed=rank == culprit) for culprit in range(-1, size)]
    return [answer.failed for answer in answers] + [answer.stop for answer in answers]


def _finish_at_different_times(rank: int, size: int) -> str:
    with Heartbeats(launch_facts(), interval_s=0.1, limit_s=1.0) as heartbeats:
        time.sleep(0.3 + 0.7 * ((rank + 1) % size))
    return str(heartbeats.lost())


def _one_raises(rank: int, size: int) -> None:
    with Heartbeats(launch_facts(), interval_s=0.1) as heartbeats:
        try:
            if rank == 2:
                raise ZeroDivisionError("a bug on rank 2")
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            raise RuntimeError(heartbeats.explain(error)) from None


def _identify(rank: int, size: int, offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = torch.ones(1)
    dist.all_reduce(total)
    return rank, total * 10 + offset


def _leave_and_join_again(rank: int, size: int, url: str) -> float:
    with pytest.raises(LaunchError, match="already joined"):
        join(launch_facts(), timeout_s=5.0, device="cpu")
    leave()
    assert not dist.is_initialized()
    join_at(rank, size, url)
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def _fail_on_one(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.all_reduce(torch.ones(1))


def _sleep_on_one(rank: int, size: int) -> None:
    time.sleep(60.0 * rank)


SCENARIOS = {
    f"{how.name} of rank {victim}, store {'on the agent' if agent_store else 'on rank 0'}": (how, victim, agent_store)
    for how in (signal.SIGKILL, signal.SIGSTOP)
    for victim in (0, 1)
    for agent_store in (False, True)
}


def _wait_until_ready(ranks: list[Rank]) -> None:
    end = time.monotonic() + 60.0
    while waiting := [rank for rank in ranks if READY not in rank.stderr()]:
        early = [rank.stderr() for rank in waiting if rank.exit_code(0) is not None]
        assert not early and time.monotonic() < end, early
        time.sleep(0.2)


@pytest.fixture(scope="module")
def losses() -> Iterator[dict[str, list[tuple[int | None, str]]]]:
    """Exit code and stderr of both survivors of every scenario; all run at once, since each only waits."""
    jobs = {name: start_ranks(_reduce_forever, 3, agent_store=case[2]) for name, case in SCENARIOS.items()}
    try:
        _wait_until_ready([rank for job in jobs.values() for rank in job])
        for name, (how, victim, _) in SCENARIOS.items():
            jobs[name][victim].send_signal(how)
        end = time.monotonic() + LIMIT_S
        survivors = {name: [r for r in jobs[name] if r.rank != case[1]] for name, case in SCENARIOS.items()}
        codes = {
            name: [rank.exit_code(max(0.0, end - time.monotonic())) for rank in ranks]
            for name, ranks in survivors.items()
        }
        yield {
            name: [(code, rank.stderr()) for code, rank in zip(codes[name], ranks, strict=True)]
            for name, ranks in survivors.items()
        }
    finally:
        for job in jobs.values():
            for rank in job:
                rank.end()


def test_the_harness_returns_results_in_rank_order():
    results = run_ranks(_identify, 3, torch.tensor([0.5]))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(value.tolist() == [30.5] for _, value in results)


def test_ranks_can_leave_and_join_without_a_launcher(tmp_path):
    assert run_ranks(_leave_and_join_again, 3, f"file://{tmp_path}/meeting") == [3.0] * 3


def test_the_harness_brings_back_the_traceback():
    with pytest.raises(RanksFailed, match=r"rank 1: Traceback[\s\S]*ValueError: only here"):
        run_ranks(_fail_on_one, 2)


def test_the_harness_ends_slow_ranks():
    with pytest.raises(RanksFailed, match="rank 0: returned\n--- rank 1: still running"):
        run_ranks(_sleep_on_one, 2, timeout=2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_lost_rank_is_named_and_the_others_leave(losses, name):
    victim = SCENARIOS[name][1]
    for code, said in losses[name]:
        assert code == EXIT_LOST_RANK, said
        assert f"rank {victim} was lost" in said


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    results = run_ranks(_stop_when_told, 3)
    steps = {step for step, _ in results}
    assert len(steps) == 1 and steps.pop() >= 20
    assert [name for _, name in results] == [None, "SIGTERM", None]


def test_a_failure_on_any_rank_reaches_all():
    answers = run_ranks(_agree_on_failure, 2)
    assert answers == [[False, True, True, False, False, False]] * 2


def test_ranks_that_finish_are_not_called_lost():
    assert run_ranks(_finish_at_different_times, 3) == ["None"] * 3


def test_an_exception_on_one_rank_is_what_the_others_report():
    with pytest.raises(RanksFailed) as failure:
        run_ranks(_one_raises, 3)
    assert "rank 2: Traceback" in str(failure.value)
    assert "rank 2 was lost: it stopped with ZeroDivisionError: a bug on rank 2" in str(failure.value)
