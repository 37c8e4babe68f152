"""Counter-based randomness: known answers, independence of the batch, independence of the streams, distributions."""

import time

import pytest
import torch
from scipy import stats

from dfkd_dist.parallel.randomness import Randomness, philox4x32

RANDOM = Randomness(1234)
INDICES = torch.arange(40)
METHODS = {
    "uniform": lambda r, i, **k: r.uniform("p", i, (3, 5), **k),
    "uniform64": lambda r, i, **k: r.uniform("p", i, (3, 5), dtype=torch.float64, **k),
    "normal": lambda r, i, **k: r.normal("p", i, (3, 5), **k),
    "normal64": lambda r, i, **k: r.normal("p", i, (3, 5), dtype=torch.float64, **k),
    "integers": lambda r, i, **k: r.integers("p", i, 1000003, (7,), **k),
    "beta": lambda r, i, **k: r.beta("p", i, 0.4, 1.7, **k),
}
# tests/kat_vectors of Random123 (D. E. Shaw Research), the lines "philox4x32 10": counter, key, answer.
PINNED = [[615, 233, 352], [486, 246, 738]]
PINNED_ORDER = [7, 1, 0, 3, 2, 4, 6, 5]
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox4x32(counter, key) == answer
    words = philox4x32([torch.tensor([word, word]) for word in counter], key)
    assert [word.tolist() for word in words] == [[word, word] for word in answer]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_the_same_in_every_batch(method):
    draw = METHODS[method]
    whole = draw(RANDOM, INDICES)
    for part in (slice(17, 18), slice(3, 30), slice(0, 40, 4), slice(1, 40, 13)):
        assert torch.equal(draw(RANDOM, INDICES[part]), whole[part])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(RANDOM, shuffled), whole[shuffled])
    assert draw(RANDOM, INDICES[:0]).shape == (0, *whole.shape[1:])


def test_passes_of_a_large_draw_join_without_a_seam(monkeypatch):
    whole = RANDOM.normal("p", INDICES, (33,))
    monkeypatch.setattr("dfkd_dist.parallel.randomness._CHUNK_CPU", 7)
    assert torch.equal(RANDOM.normal("p", INDICES, (33,)), whole)


@pytest.mark.parametrize("method", METHODS)
def test_every_coordinate_selects_another_stream(method):
    draw = METHODS[method]
    draws = [
        draw(Randomness(seed), INDICES, owner=owner, round=round, step=step)
        for seed in (0, 1, -1, 2**70)
        for owner in ("", "teacher_1")
        for round in (0, 1, 2**32 - 1)
        for step in (0, 1)
    ]
    flat = torch.stack(draws).flatten(1).double()
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    spread = torch.corrcoef(flat) - torch.eye(len(flat))
    assert spread.abs().max() < 5 / flat.shape[1] ** 0.5


def test_purposes_and_kinds_do_not_share_their_bits():
    u = RANDOM.uniform("ab", INDICES, (50,), owner="c").flatten()
    for other in (
        RANDOM.uniform("a", INDICES, (50,), owner="bc").flatten(),
        RANDOM.normal("ab", INDICES, (50,), owner="c").flatten(),
        RANDOM.integers("ab", INDICES, 2**40, (50,), owner="c").flatten().float(),
    ):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.1


def test_values_are_pinned_so_that_a_change_of_the_stream_is_noticed():
    assert RANDOM.integers("latents", torch.tensor([0, 17]), 1000, (3,), round=2, step=5).tolist() == PINNED
    assert RANDOM.permutation("order", 8, owner="t").tolist() == PINNED_ORDER


def test_uniform_moments_and_distribution():
    u = RANDOM.uniform("u", torch.arange(500), (100,), dtype=torch.float64).flatten()
    assert 0 <= u.min() and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    # neighbours along both axes are uncorrelated
    grid = u.reshape(500, 100) - 0.5
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        assert abs((a * b).mean() * 12) < 5 / 49_000**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform_stays_below_one_after_the_cast(dtype, monkeypatch):
    ones = [torch.full((4,), 0xFFFFFFFF)] * 4
    monkeypatch.setattr("dfkd_dist.parallel.randomness.philox4x32", lambda counter, key: ones)
    u = RANDOM.uniform("u", torch.arange(4), (2,), dtype=dtype)
    assert u.dtype == dtype
    assert (u < 1).all() and (u > 0.99).all()
    assert RANDOM.normal("u", torch.arange(4), (2,), dtype=dtype).isfinite().all()


def test_normal_moments_and_distribution():
    z = RANDOM.normal("z", torch.arange(500), (101,), dtype=torch.float64)  # odd: half a block is left over
    assert z.shape == (500, 101)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(z.flatten().numpy())) < 0.1
    assert abs((z[:, 0] * z[:, 1]).mean()) < 5 / 500**0.5


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.2, 0.2), (0.5, 3.0), (2.0, 0.7), (30.0, 5.0)])
def test_beta_distribution(alpha, beta):
    b = RANDOM.beta("mix", torch.arange(20_000), alpha, beta)
    assert b.dtype == torch.float64 and b.shape == (20_000,)
    assert stats.kstest(b.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3


def test_beta_of_tiny_shapes_is_finite():
    b = RANDOM.beta("mix", torch.arange(2000), 1e-3, 1e-3)
    assert b.isfinite().all() and ((b >= 0) & (b <= 1)).all()
    assert abs(b.mean() - 0.5) < 0.06


def test_integers_are_uniform():
    n = RANDOM.integers("label", torch.arange(20_000), 10)
    assert n.dtype == torch.int64 and n.shape == (20_000,)
    assert stats.chisquare(torch.bincount(n, minlength=10).numpy()).pvalue > 1e-3
    assert (RANDOM.integers("label", INDICES, 1) == 0).all()


def test_permutation_is_one_and_changes_with_the_round():
    first, second = (RANDOM.permutation("order", 1001, round=r) for r in (0, 1))
    assert first.sort().values.tolist() == list(range(1001))
    assert not torch.equal(first, second)
    assert torch.equal(first, RANDOM.permutation("order", 1001, round=0))
    assert [RANDOM.permutation("order", n).tolist() for n in (0, 1)] == [[], [0]]
    # all 6 orders of 3 things are equally likely
    orders = [tuple(RANDOM.permutation("order", 3, step=s).tolist()) for s in range(1200)]
    assert stats.chisquare([orders.count(order) for order in set(orders)]).pvalue > 1e-3
    assert len(set(orders)) == 6


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: RANDOM.uniform("p", torch.tensor([-1])), "sample index"),
        (lambda: RANDOM.uniform("p", torch.tensor([2**32])), "sample index"),
        (lambda: RANDOM.uniform("p", torch.zeros(2)), "int64"),
        (lambda: RANDOM.normal("p", INDICES, round=-1), "round"),
        (lambda: RANDOM.normal("p", INDICES, step=2**32), "step"),
        (lambda: RANDOM.integers("p", INDICES, 0), "high"),
        (lambda: RANDOM.beta("p", INDICES, 0.0, 1.0), "alpha"),
        (lambda: RANDOM.permutation("p", -1), "n must"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_integer_draws_are_bit_equal_on_a_gpu():
    gpu = INDICES.cuda()
    assert torch.equal(RANDOM.uniform("p", gpu, (9,)).cpu(), RANDOM.uniform("p", INDICES, (9,)))
    assert torch.equal(RANDOM.integers("p", gpu, 77).cpu(), RANDOM.integers("p", INDICES, 77))
    assert torch.equal(RANDOM.permutation("p", 999, device="cuda").cpu(), RANDOM.permutation("p", 999))
    assert torch.allclose(RANDOM.normal("p", gpu, (9,)).cpu(), RANDOM.normal("p", INDICES, (9,)), rtol=1e-6)
    assert torch.allclose(RANDOM.beta("p", gpu, 0.3, 0.3).cpu(), RANDOM.beta("p", INDICES, 0.3, 0.3))


def test_a_batch_of_latents_costs_milliseconds():
    # measured: 2^18 normals in 7-9 ms on one CPU thread
    indices = torch.arange(256)
    RANDOM.normal("z", indices, (1024,))
    started = time.perf_counter()
    RANDOM.normal("z", indices, (1024,))
    assert time.perf_counter() - started < 0.1
