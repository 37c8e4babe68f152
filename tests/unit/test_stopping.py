"""The stop flag, the agreement of a group of one, and the judgement of heartbeats on a clock that the test turns."""

import os
import signal

import pytest

from dfkd_dist.parallel import stopping
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.launch import LaunchFacts
from dfkd_dist.parallel.stopping import Agreement, Heartbeats, Lost, StopFlag, agree


def test_exit_codes():
    assert (stopping.EXIT_STOPPED, stopping.EXIT_LOST_RANK, stopping.EXIT_NONFINITE) == (75, 76, 77)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_only_sets_the_flag_and_handlers_come_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopFlag() as flag:
        assert flag.signal is None
        os.kill(os.getpid(), number)
        assert flag.signal == name
        os.kill(os.getpid(), signal.SIGUSR2)
        assert flag.signal == name  # the first one is the reason
    assert signal.getsignal(number) == before
    assert flag.signal == name


def test_a_second_interrupt_raises_unless_it_is_an_echo(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # torchrun's agent passes the terminal's signal on
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.signal == "SIGINT"
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("stop", "failed"), [(False, False), (True, False), (False, True)])
def test_one_process_agrees_with_itself(stop, failed):
    assert agree(ALONE, stop=stop, failed=failed) == Agreement(stop, failed)


def test_a_single_process_has_no_heartbeats():
    with Heartbeats(LaunchFacts()) as heartbeats:
        assert heartbeats.lost() is None
        said = heartbeats.explain(RuntimeError("boom"))
    assert "no rank was found lost" in said and "boom" in said


class FakeStore:
    """A store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def add(self, key, amount):
        self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        return [self.values[key] for key in keys]

    def compare_set(self, key, expected, desired):
        if self.values.get(key, b"").decode() == expected:
            self.set(key, desired)


class Clock:
    """Time in the hands of the test: small ticks, so that no pause is suspected."""

    def __init__(self, monkeypatch, *beats: Heartbeats) -> None:
        self.now, self.beats = 1000.0, beats
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)

    def pass_s(self, seconds, *talking):
        for _ in range(round(seconds)):
            self.now += 1.0
            for beat in self.beats:
                beat.lost()
            for beat in talking:
                beat._exchange()


def make_world(monkeypatch, entered):
    """Three ranks that share a store, without threads: the test lets them talk."""
    store = FakeStore()
    monkeypatch.setattr(stopping, "open_store", lambda facts, timeout_s: store)
    monkeypatch.setattr(stopping.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(stopping.threading.Thread, "join", lambda self, timeout=None: None)
    beats = [Heartbeats(LaunchFacts(rank, 3, agent_store=True)) for rank in range(3)]
    clock = Clock(monkeypatch, *beats)
    for beat in beats[:entered]:
        beat.__enter__()
    return beats, clock


@pytest.fixture
def world(monkeypatch):
    return make_world(monkeypatch, 3)


def test_beating_ranks_are_not_lost(world):
    beats, clock = world
    clock.pass_s(30, *beats)
    assert [beat.lost() for beat in beats] == [None] * 3


def test_a_silent_rank_is_published_by_rank_0(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    clock.pass_s(8, beats[0], beats[1])
    assert beats[1].lost() is None  # it does not watch rank 2 itself
    clock.pass_s(2, beats[0], beats[1])
    for beat in beats[:2]:
        lost = beat.lost()
        assert lost is not None and lost.rank == 2 and "no heartbeat for" in lost.why
    assert "pid" in beats[1].lost().why
    assert "rank 2 was lost" in beats[1].explain(RuntimeError("connection closed"))


def test_a_silent_rank_0_is_seen_by_all(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    clock.pass_s(9, beats[1], beats[2])
    assert [beat.lost().rank for beat in beats[1:]] == [0, 0]


def test_a_store_that_does_not_answer_names_its_host(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    clock.pass_s(9)
    lost = beats[1].lost()
    assert lost.rank == 0 and "the store at" in lost.why and "agent" in lost.why


def test_a_rank_that_said_goodbye_is_not_lost(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    beats[2]._say_goodbye()
    clock.pass_s(30, beats[0], beats[1])
    assert beats[0].lost() is None
    beats[0]._say_goodbye()
    clock.pass_s(1, beats[1])
    clock.pass_s(30)
    assert beats[1].lost() is None  # not even when the store has gone with rank 0


def test_a_rank_may_come_late_but_not_die_early(monkeypatch):
    beats, clock = make_world(monkeypatch, 2)
    clock.pass_s(55, beats[0], beats[1])
    assert beats[0].lost() is None
    clock.pass_s(7, beats[0], beats[1])
    assert beats[0].lost().rank == 2


def test_silence_counts_from_the_entry_on(world):
    beats, clock = world
    clock.pass_s(10, beats[0], beats[1])
    assert beats[0].lost().rank == 2


def test_a_suspended_job_is_not_mistaken_for_a_loss(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    clock.now += 600.0
    clock.pass_s(5, *beats)
    assert [beat.lost() for beat in beats] == [None] * 3


def test_an_exception_becomes_the_verdict_and_the_first_one_stays(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    for rank, error in ((2, ValueError("bad shard")), (1, RuntimeError("connection closed"))):
        beats[rank].close(error)
        beats[rank]._say_goodbye()
    clock.pass_s(1, beats[0])
    assert beats[0].lost() == Lost(2, beats[0].lost().why)
    assert "ValueError: bad shard" in beats[0].lost().why


def test_leaving_by_system_exit_is_a_clean_goodbye(world):
    beats, clock = world
    clock.pass_s(3, *beats)
    beats[1].close(SystemExit(stopping.EXIT_STOPPED))
    beats[1]._say_goodbye()
    clock.pass_s(30, beats[0], beats[2])
    assert beats[0].lost() is None
