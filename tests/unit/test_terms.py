"""A generator's terms by name against the equations written out, and their shares over slices of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_dist.config import AdversarySpec, BNTermSpec, DiscriminatorSpec, MosaicLossSpec
from dfkd_dist.models.signals import BN, FEATURES, LOGITS, LayerStatistics, Signals
from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.statistics import Moments, combine_moments, pooled, share_of, sum_own
from dfkd_dist.sources.terms import GeneratorStep, generator_terms, need_of

N, C, D = 6, 4, 5


def _random(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _step(sync: Group = ALONE, replicas: int = 1, count: int = N) -> GeneratorStep:
    maps = [_random(N, c, 3, 3, seed=c) for c in (2, 3)]
    layers = [
        LayerStatistics(
            m.mean((0, 2, 3)), m.var((0, 2, 3), correction=0), torch.zeros(len(m[0])), torch.ones(len(m[0]))
        )
        for m in maps
    ]
    teacher = Signals(2 * _random(N, C, seed=1), _random(N, D, seed=2), bn=layers)
    scores = 2 * _random(N, 1, 3, 3, seed=4)
    return GeneratorStep(teacher, 2 * _random(N, C, seed=3), count, sync, replicas, scores)


def _softmax(logits_NC: Tensor, tau: float = 1.0) -> Tensor:
    e = (logits_NC / tau).exp()
    return e / e.sum(1, keepdim=True)


def _naive(step: GeneratorStep, bn: BNTermSpec, adversary: AdversarySpec, game: DiscriminatorSpec) -> dict[str, Tensor]:
    """DFMF Eqs. 3 and 5 (and DAFL's terms, and MosaicKD Eq. 4's first) as printed, on a whole batch."""
    z, a, tau = step.teacher.logits_NC, step.other_NC, adversary.temperature
    assert a is not None and step.teacher.features_ND is not None and step.scores is not None
    d = 1 / (1 + (-step.scores).exp())
    fooled_N = (-d.log() if game.form == "non_saturating" else (1 - d).log()).flatten(1).sum(1)
    p, mean_p = _softmax(z), _softmax(z).mean(0)
    pt, qt = _softmax(z, tau), _softmax(a, tau)
    kl_N = (pt * (pt / qt).log()).sum(1)
    l1_N = (z - a).abs().mean(1)
    same_N = (z.argmax(1) == a.argmax(1)).double()
    forms = {"kl": kl_N, "l1": l1_N, "log_l1": (l1_N.mean() + 1).log(), "masked_kl": kl_N * same_N}
    total = torch.zeros((), dtype=torch.float64)
    for s in step.teacher.bn:
        if bn.form == "l2":
            total = total + (s.mean_C - s.stored_mean_C).norm() + (s.var_C - s.stored_var_C).norm()
        else:
            shift = (s.mean_C - s.stored_mean_C) ** 2
            d_C = (shift + s.var_C) / (2 * s.stored_var_C) - (s.var_C.sqrt() / s.stored_var_C.sqrt()).log() - 0.5
            total = total + (d_C.mean() if bn.channels == "mean" else d_C.sum())
    return {
        "bn": total,
        "ice": -(p * p.log()).sum(1).mean(),
        "oh": -p.max(1).values.log().mean(),
        "bce": (mean_p * mean_p.log()).sum(),
        "act": -step.teacher.features_ND.abs().mean(1).mean(),
        "adv": -forms[adversary.form].mean(),
        "patch": fooled_N.mean() / (9 if game.reduction == "mean" else 1),
    }


@pytest.mark.parametrize("form", ["gaussian_kl", "l2"])
@pytest.mark.parametrize("channels", ["mean", "sum"])
@pytest.mark.parametrize("adversary", ["kl", "l1", "log_l1", "masked_kl"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_term_as_printed(form: Any, channels: Any, adversary: Any, temperature: float) -> None:
    step = _step()
    bn = BNTermSpec(form=form, channels=channels)
    game = AdversarySpec(against="student", form=adversary, temperature=temperature)
    patches = DiscriminatorSpec(
        form="saturating" if channels == "sum" else "non_saturating", reduction="sum" if form == "l2" else "mean"
    )
    terms, expected = generator_terms(step, bn, game, patches), _naive(step, bn, game, patches)
    assert terms.keys() == expected.keys() == MosaicLossSpec().weights().keys()
    for name, compute in terms.items():
        assert compute().item() == pytest.approx(expected[name].item(), abs=1e-10), name


def test_what_the_terms_want_of_the_teacher() -> None:
    assert need_of({"bn": 0.0, "ice": 1.0, "act": 0.0}) == {LOGITS}
    assert need_of({"bn": 0.1}) == {LOGITS, BN}
    assert need_of({"act": 1.0, "bn": 1.0}) == {LOGITS, FEATURES, BN}


def test_a_divided_step_counts_the_whole_row() -> None:
    game = BNTermSpec(), AdversarySpec(against="student"), DiscriminatorSpec()
    half, whole = generator_terms(_step(count=2 * N), *game), generator_terms(_step(), *game)
    for name in ("ice", "oh", "act", "adv", "patch"):
        assert half[name]().item() == pytest.approx(whole[name]().item() / 2, abs=1e-12)


# ------------------------------------------------------------------------------------ shares and moments


class Fake(Group):
    """A group whose other members' tensors are known beforehand."""

    def __new__(cls, *args: Any) -> Fake:
        return object.__new__(cls)

    def __init__(self, rank: int, others: list[Tensor]) -> None:
        super().__init__(tuple(range(len(others))), rank)
        object.__setattr__(self, "others", others)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor if r == self.rank else other for r, other in enumerate(self.others)]  # type: ignore


def test_sum_own_passes_gradient_to_the_own_part_alone() -> None:
    others = [_random(3, seed=r) for r in range(3)]
    own = others[1].clone().requires_grad_()
    total = sum_own(own, Fake(1, others))
    assert torch.allclose(total, torch.stack(others).sum(0))
    total.square().sum().backward()
    assert torch.allclose(own.grad, 2 * torch.stack(others).sum(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("sync", "total", "gradient"), [(1, 1, 1.0), (4, 4, 1.0), (1, 4, 0.25)])
def test_shares_add_up_to_the_term(sync: int, total: int, gradient: float) -> None:
    value = torch.tensor(3.0, requires_grad=True)
    part = share_of(value * 1.0, Group(tuple(range(sync))), total)
    part.backward()
    assert part.item() * total == pytest.approx(3.0) and value.grad is not None and value.grad.item() == gradient


@pytest.mark.parametrize("sizes", [[4, 3], [1, 1, 5], [0, 4], [3, 0, 2]])
def test_pooled_moments_are_those_of_the_union(sizes: list[int]) -> None:
    x = _random(sum(sizes), 3, 2, 2, seed=0)
    parts = x.split(sizes)
    means = torch.stack([p.mean((0, 2, 3)) for p in parts])  # NaN where empty
    variances = torch.stack([p.var((0, 2, 3), correction=0) if len(p) else means[0] * torch.nan for p in parts])
    mean_C, var_C = pooled(means, variances, torch.tensor(sizes, dtype=torch.float64)[:, None])
    assert torch.allclose(mean_C, x.mean((0, 2, 3))) and torch.allclose(var_C, x.var((0, 2, 3), correction=0))


def test_moments_far_from_zero_keep_their_variance() -> None:
    x = (_random(8, 1, seed=0) + 1e6).float()
    parts = x.split([3, 5])
    means = torch.stack([p.mean(0) for p in parts])
    variances = torch.stack([p.var(0, correction=0) for p in parts])
    _, var_C = pooled(means, variances, torch.tensor([[3.0], [5.0]]))
    assert var_C.item() == pytest.approx(x.double().var(0, correction=0).item(), rel=0.05)


def test_gradient_of_combined_moments_is_that_of_the_whole_batch() -> None:
    x, sizes = _random(7, 3, seed=0), [2, 5]
    whole = x.clone().requires_grad_()
    _loss(Moments(whole.mean(0), whole.var(0, correction=0))).backward()
    packed = [torch.cat([p.mean(0), p.var(0, correction=0), torch.tensor([float(len(p))])]) for p in x.split(sizes)]
    found = []
    for rank, part in enumerate(x.split(sizes)):
        own = part.clone().requires_grad_()
        (m,) = combine_moments([Moments(own.mean(0), own.var(0, correction=0))], len(own), Fake(rank, packed))
        _loss(m).backward()
        found.append(own.grad)
    assert torch.allclose(torch.cat(found), whole.grad, atol=1e-12)  # type: ignore[arg-type]


def _loss(m: Moments) -> Tensor:
    return (m.mean_C.sin() * 3 + m.var_C.log()).sum()
