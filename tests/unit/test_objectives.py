"""Objectives against the pure losses: what each wants to hear, weighs, trains and remembers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_dist.config import NoisySpec, ObjectiveSpec, Recipe, RecipeError, parse
from dfkd_dist.config.objectives import TERM_NAMES
from dfkd_dist.losses import distillation, hint, noisy, relational, vid
from dfkd_dist.losses import selfsupervised as ss
from dfkd_dist.models.heads import MapRegressor
from dfkd_dist.models.signals import FEATURES, LOGITS, MAP
from dfkd_dist.objectives.distillation import TERMS
from dfkd_dist.objectives.registry import Context, make_objective, needed, needs
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.views import make_views
from tests.objectives import SAMPLES, Class, batch, said, section

TWO = ("tiny", "wrn16_1", "resnet8")
ALL = frozenset({LOGITS, FEATURES, MAP})
SMALL = {"dim": 6, "negatives": 9}


def alone(name: str, **options: object) -> ObjectiveSpec:
    """One term only."""
    return section(**({"kl": 0.0, name: 2.0} | options))


# ---------------------------------------------------------------------------------------------- the table of terms


def test_every_weight_has_its_term() -> None:
    assert tuple(TERMS) == TERM_NAMES == tuple(ObjectiveSpec().weights())


@pytest.mark.parametrize("name", TERMS)
def test_a_term_alone(name: str) -> None:
    learner = Class(alone(name, contrast=SMALL), TWO)
    losses = learner.losses(batch(5))
    assert list(losses.terms) == [name] and losses.weights == {name: 2.0}
    gradients = learner.gradients(losses)
    assert losses.total.isfinite() and all(g.isfinite().all() for g in gradients.values())
    assert gradients["student.network.conv1.weight"].any()
    heads = [g for n, g in gradients.items() if n.startswith("objective.")]
    assert all(g.any() for g in heads) and bool(heads) == (name in ("vid", "hint", "crd"))
    assert "objective" not in str(learner.student.state_dict().keys())


def test_only_what_is_compared_is_asked_for() -> None:
    assert needed(ObjectiveSpec()) == {LOGITS}
    assert needed(alone("vid")) == needed(alone("at")) == needed(alone("hint")) == {LOGITS, MAP}
    assert needed(alone("crd")) == needed(alone("rkd_d")) == needed(section(rkd_a=1.0)) == {LOGITS, FEATURES}
    assert needed(section(vid=1.0, crd=1.0)) == ALL
    named = needs(section(hint=1.0, fitnet={"student": "block1", "teacher": "block2"}))
    assert named.teacher == {LOGITS, "map:block2"} and named.student == {LOGITS, "map:block1"}
    assert needed(section(kind="noisy")) == needed(section(kind="sskd", ss=0.0)) == {LOGITS}
    assert needed(section(kind="sskd")) == {LOGITS, FEATURES}


def test_terms_by_value() -> None:
    spec = section(kl=1.0, vid=0.5, l1=0.25, at=3.0, ce=0.1, hint=2.0, rkd_d=25.0, rkd_a=50.0, temperature=2.0)
    learner, given = Class(spec, TWO), batch(5)
    found = learner.losses(given)
    own = said(learner.student, given.images_NCHW, ALL)
    others = [said(t, given.images_NCHW, ALL) for t in learner.teachers]
    w, tau = learner.weights, 2.0
    target = sum(a * torch.softmax(o.logits_NC / tau, 1) for a, o in zip(w, others, strict=True))
    expected = {
        "kl": F.kl_div(torch.log_softmax(own.logits_NC / tau, 1), target, reduction="batchmean"),
        "l1": (own.logits_NC - sum(a * o.logits_NC for a, o in zip(w, others, strict=True))).abs().mean(),
        "ce": F.cross_entropy(own.logits_NC, given.labels_N),
    }
    expected |= dict.fromkeys(("vid", "at", "hint", "rkd_d", "rkd_a"), 0.0)
    heads = {name: learner.objective.terms[name].heads for name in ("vid", "hint")}
    for k, (a, other) in enumerate(zip(w, others, strict=True)):
        mine, theirs = vid.match_spatial(own.tensor(MAP), other.tensor(MAP))
        head = heads["vid"][k]
        expected["vid"] += a * vid.vid(head(mine), theirs, vid.variance(head.rho)).mean()
        expected["at"] += a * distillation.attention_transfer(own.tensor(MAP), other.tensor(MAP)).mean()
        expected["hint"] += a * hint.hint(heads["hint"][k](own.tensor(MAP)), other.tensor(MAP)).mean()
        expected["rkd_d"] += a * relational.distance(own.tensor(FEATURES), other.tensor(FEATURES))
        expected["rkd_a"] += a * relational.angle(own.tensor(FEATURES), other.tensor(FEATURES))
    assert list(found.terms) == [name for name in TERM_NAMES if name != "crd"]
    for name, value in found.terms.items():
        assert value.item() == pytest.approx(torch.as_tensor(expected[name]).item(), rel=1e-12), name


def test_hints_at_named_layers() -> None:
    spec = alone("hint", fitnet={"student": "block1", "teacher": "block2", "activation": "relu"})
    learner, given = Class(spec, ("wrn16_1", "wrn16_1")), batch(3)
    found = learner.losses(given)
    (head,) = learner.objective.terms["hint"].heads
    own = said(learner.student, given.images_NCHW, frozenset({LOGITS, "map:block1"})).tensor("map:block1")
    other = said(learner.teachers[0], given.images_NCHW, frozenset({LOGITS, "map:block2"})).tensor("map:block2")
    assert head.relu and found.terms["hint"].item() == pytest.approx(hint.hint(head(own), other).mean().item())


@pytest.mark.parametrize(
    ("own", "other", "kernel"),
    [
        ((3, 4, 4), (5, 4, 4), (1, 1)),
        ((3, 8, 8), (5, 4, 4), (3, 3)),
        ((3, 4, 4), (5, 8, 8), (4, 4)),
        ((3, 7, 6), (5, 4, 4), (4, 3)),
        ((3, 4, 4), (5, 7, 6), (4, 3)),
    ],
)
def test_a_regressor_leads_to_the_teachers_shape(
    own: tuple[int, ...], other: tuple[int, ...], kernel: tuple[int, int]
) -> None:
    head = MapRegressor(own, other)
    assert head(torch.zeros(2, *own)).shape == (2, *other) and head.convolution.kernel_size == kernel


def test_a_regressor_that_would_grow_and_shrink_is_refused() -> None:
    with pytest.raises(ValueError, match="4x8 to one of 8x5"):
        MapRegressor((3, 4, 8), (3, 8, 5))


def test_a_missing_signal_is_named_with_its_term() -> None:
    context = Context([1.0], {LOGITS: (5,)}, [{LOGITS: (5,), FEATURES: (3,)}], 5)
    with pytest.raises(ValueError, match="objective.rkd_d compares the signal 'features', which the student does not"):
        make_objective(alone("rkd_d"), context)
    with pytest.raises(ValueError, match="objective.hint compares the signal 'map:x'"):
        make_objective(alone("hint", fitnet={"student": "x"}), context)
    with pytest.raises(ValueError, match="objective.crd needs a stream of two samples or more, found None"):
        make_objective(alone("crd"), context)


@pytest.mark.parametrize(
    "spec",
    [
        {"vid": 1.0, "l1": 1.0, "at": 1.0, "ce": 1.0, "hint": 1.0, "rkd_d": 1.0, "rkd_a": 1.0},
        {"crd": 1.0, "contrast": SMALL},
        {"kind": "noisy"},
        {"kind": "sskd", "keep_tf": 0.5},
    ],
)
def test_networks_in_half_precision(spec: dict[str, object]) -> None:
    learner = Class(section(**spec), TWO)
    for module in (learner.student, learner.objective, *learner.teachers):
        module.float()
    given = batch(5, views=learner.objective.views)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learner.losses(replace(given, images_NCHW=given.images_NCHW.float()))
    assert all(term.dtype is torch.float32 for term in losses.terms.values())
    gradients = learner.gradients(losses)
    assert all(g.isfinite().all() for g in gradients.values()) and gradients["student.network.conv1.weight"].any()


# ----------------------------------------------------------------------------------------------------------- CRD


def crd(**options: object) -> Class:
    return Class(alone("crd", contrast=SMALL | options), TWO)


def test_crd_by_value() -> None:
    learner, given = crd(), batch(5)
    term = learner.objective.terms["crd"]
    memory, tau = term.memory.clone(), 0.07
    found = learner.losses(given).terms["crd"]
    own = said(learner.student, given.images_NCHW, ALL).tensor(FEATURES)
    drawn = Randomness(7).integers("crd/negatives", given.slots_N, SAMPLES - 1, (9,))
    negatives = drawn + (drawn >= given.ids_N.unsqueeze(1))
    rows = torch.cat([given.ids_N.unsqueeze(1), negatives], 1)
    assert (negatives != given.ids_N.unsqueeze(1)).all() and negatives.max() < SAMPLES
    total = 0.0
    for k, weight in enumerate(learner.weights):
        other = said(learner.teachers[k], given.images_NCHW, ALL).tensor(FEATURES)
        embedded = F.normalize(term.student_heads[k](own)), F.normalize(term.teacher_heads[k](other))
        for e, m, log_z in ((embedded[0], 2 * k + 1, 2 * k), (embedded[1], 2 * k, 2 * k + 1)):
            p = torch.exp(torch.einsum("ne,nke->nk", e, memory[m][rows]) / tau)
            z = p.detach().mean() * SAMPLES
            assert term.log_z[log_z].item() == pytest.approx(math.log(z), rel=1e-12)
            h = (p / z) / (p / z + 9 / SAMPLES)
            total += weight * -(h[:, 0].log() + (1 - h[:, 1:]).log().sum(1)).mean().item()
        for m, e in ((2 * k, embedded[0]), (2 * k + 1, embedded[1])):
            moved = F.normalize(0.5 * memory[m][given.ids_N] + 0.5 * e)
            assert torch.allclose(term.memory[m][given.ids_N], moved, rtol=1e-10)
            others = [i for i in range(SAMPLES) if i not in given.ids_N.tolist()]
            assert torch.equal(term.memory[m][others], memory[m][others])
    assert found.item() == pytest.approx(total, rel=1e-10)


def test_z_is_found_once() -> None:
    learner = crd()
    term = learner.objective.terms["crd"]
    assert term.log_z.isnan().all()
    learner.losses(batch(5))
    first = term.log_z.clone()
    learner.losses(batch(5, at=(0, 1)))
    assert first.isfinite().all() and torch.equal(term.log_z, first)


def test_negatives_are_samples_that_were_seen() -> None:
    learner = crd(negatives=200)
    term = learner.objective.terms["crd"]
    seen: set[int] = set()
    for step in range(2):
        given = batch(4, at=(0, step))
        assert set(term._negatives(given.ids_N, given.slots_N, given.at).flatten().tolist()) - seen  # any sample
        learner.losses(given)
        seen |= set(given.ids_N.tolist())
    given = batch(4, at=(1, 0))
    drawn = term._negatives(given.ids_N, given.slots_N, given.at)
    assert set(drawn.flatten().tolist()) <= seen
    inside = [n for n, i in enumerate(given.ids_N.tolist()) if i in seen]
    assert all(given.ids_N[n] not in drawn[n] for n in inside)
    learner.losses(given)  # what this round sees, the next one knows
    assert torch.equal(term._negatives(given.ids_N, given.slots_N, given.at), drawn)


def test_crd_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    learner, other = crd(), crd()
    for at in ((0, 0), (0, 1), (1, 0)):
        learner.losses(batch(5, at=at))
    other.losses(batch(3, at=(0, 0)))  # leaves something to be forgotten
    other.objective.load_state_dict(learner.objective.state_dict())
    for at in ((1, 1), (2, 0)):
        assert torch.equal(learner.losses(batch(5, at=at)).total, other.losses(batch(5, at=at)).total)
    assert torch.equal(learner.objective.terms["crd"].memory, other.objective.terms["crd"].memory)


def test_crd_needs_numbered_samples() -> None:
    with pytest.raises(ValueError, match="objective.crd needs a source that numbers its samples"):
        crd().losses(replace(batch(3), ids_N=None))


# ---------------------------------------------------------------------------------------------------------- DFND


def test_noisy_by_value() -> None:
    learner, given = Class(section(kind="noisy", kl=0.5, temperature=4.0, accuracy=0.8, noise_rate=9.0), TWO), batch(6)
    with torch.no_grad():
        learner.objective.noise.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(3)))
    found = learner.losses(given)
    own = said(learner.student, given.images_NCHW, ALL).logits_NC
    logits = [said(t, given.images_NCHW, ALL).logits_NC for t in learner.teachers]
    target = distillation.tempered_mean(logits, learner.weights, 4.0)
    guesses = distillation.tempered_mean(logits, learner.weights, 1.0).argmax(1)
    transition = noisy.log_transition(3.0 * learner.objective.noise, 0.8)
    assert found.weights == {"kl": 0.5, "noisy": 1.0}
    assert found.terms["kl"].item() == pytest.approx(16 * distillation.kl(target, own, 4.0).mean().item())
    expected = noisy.noisy_cross_entropy(own, guesses, transition).mean()
    assert found.terms["noisy"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_noise_matrix_learns_at_its_own_rate() -> None:
    given, lr, moved = batch(6), 0.1, []
    for rate in (1.0, 25.0):
        learner = Class(section(kind="noisy", noise_rate=rate))
        gradient = learner.gradients(learner.losses(given))["objective.noise"]
        moved.append(math.sqrt(rate) * -lr * gradient)  # from 0, so the same point for both
    assert moved[0].abs().max() > 0 and torch.allclose(moved[1], 25.0 * moved[0], rtol=1e-12)


def test_the_two_presets_of_dfnd() -> None:
    one, four = section(kind="noisy", kl=4.0, temperature=1.0), NoisySpec(kind="noisy")
    assert (four.kl, four.temperature, four.kl_scale, four.noisy) == (1.0, 4.0, "tau2", 1.0)
    given = batch(4)
    learner = Class(one)
    own = said(learner.student, given.images_NCHW, ALL).logits_NC
    target = torch.softmax(said(learner.teachers[0], given.images_NCHW, ALL).logits_NC, 1)
    assert learner.losses(given).terms["kl"].item() == pytest.approx(distillation.kl(target, own, 1.0).mean().item())


# ---------------------------------------------------------------------------------------------------------- SSKD


def test_sskd_by_value() -> None:
    spec = section(kind="sskd", keep_tf=0.5, keep_ss=0.5)
    learner, given = Class(spec, TWO), batch(7, views=4)
    found = learner.losses(given)
    assert found.weights == {"kl": 0.9, "tf": 2.7, "ss": 10.0, "head": 1.0}
    own = said(learner.student, given.images_NCHW, ALL)
    others = [said(t, given.images_NCHW, ALL) for t in learner.teachers]
    target = sum(w * torch.softmax(o.logits_NC / 4, 1) for w, o in zip(learner.weights, others, strict=True))
    probs = sum(w * torch.softmax(o.logits_NC, 1) for w, o in zip(learner.weights, others, strict=True))
    values = 16 * F.kl_div(torch.log_softmax(own.logits_NC / 4, 1), target, reduction="none").sum(1)
    assert found.terms["kl"].item() == pytest.approx(values[:7].mean().item())
    # Sample by sample, transformed version by version: how many classes come before the upright image's.
    order = [(n, v) for n in range(7) for v in (1, 2, 3)]
    truth = probs[:7].argmax(1)
    ranks = [int((probs[v * 7 + n] > probs[v * 7 + n, truth[n]]).sum()) for n, v in order]
    kept = keep(ranks, 0.5)
    expected = torch.stack([values[order[r][1] * 7 + order[r][0]] for r in kept]).mean()
    assert found.terms["tf"].item() == pytest.approx(expected.item())
    assert 0 < sum(r > 0 for r in ranks)

    def embedded(head: torch.nn.Module, features: Tensor) -> Tensor:
        return head(features).view(4, 7, -1).transpose(0, 1)

    mine = ss.similarity(embedded(learner.objective.student_head, own.tensor(FEATURES)))
    expected_ss, expected_head = 0.0, 0.0
    for weight, head, other in zip(learner.weights, learner.objective.teacher_heads, others, strict=True):
        theirs = ss.similarity(embedded(head, other.tensor(FEATURES)))
        sample_ranks = [int((row > row[r // 3]).sum()) for r, row in enumerate(theirs)]
        rows = keep(sample_ranks, 0.5)
        p, q = torch.softmax(theirs / 0.5, 1)[rows], torch.log_softmax(mine / 0.5, 1)[rows]
        expected_ss += weight * 0.25 * F.kl_div(q, p, reduction="batchmean").item()
        own_column = torch.arange(7).repeat_interleave(3)
        expected_head += weight * F.cross_entropy(theirs, own_column).item()
    assert found.terms["ss"].item() == pytest.approx(expected_ss, rel=1e-10)
    assert found.terms["head"].item() == pytest.approx(expected_head, rel=1e-10)


def keep(ranks: list[int], share: float) -> list[int]:
    """Row numbers: the right ones, and the least wrong ones."""
    wrong = sorted((rank, r) for r, rank in enumerate(ranks) if rank > 0)
    return sorted([r for r, rank in enumerate(ranks) if rank == 0] + [r for _, r in wrong[: int(len(wrong) * share)]])


def test_who_learns_from_what() -> None:
    learner = Class(section(kind="sskd"))
    losses = learner.losses(batch(5, views=4))

    def moved(name: str) -> set[str]:
        named = {f"student.{n}": p for n, p in learner.student.named_parameters()}
        named |= {n: p for n, p in learner.objective.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(losses.terms[name], list(named.values()), retain_graph=True, allow_unused=True)
        return {n.split(".")[0] for n, g in zip(named, found, strict=True) if g is not None and g.any()}

    assert moved("kl") == moved("tf") == {"student"}
    assert moved("ss") == {"student", "student_head"}
    assert moved("head") == {"teacher_heads"}


def test_first_the_head_learns_then_it_stands_still() -> None:
    learner = Class(section(kind="sskd", head_rounds=2))
    objective = learner.objective
    for round in (0, 1):
        assert list(learner.losses(batch(5, at=(round, 0), views=4)).terms) == ["kl", "tf", "head"]
    with torch.no_grad():
        objective.teacher_heads[0][0].weight.mul_(1.5)
    last = {n: p.clone() for n, p in objective.teacher_heads.named_parameters()}
    losses = learner.losses(batch(5, at=(2, 0), views=4))
    assert list(losses.terms) == ["kl", "tf", "ss"]
    with torch.no_grad():
        objective.teacher_heads[0][0].weight.mul_(2.0)  # as weight decay would
    assert torch.equal(learner.losses(batch(5, at=(2, 0), views=4)).terms["ss"], losses.terms["ss"])
    assert all(torch.equal(p, last[n]) for n, p in objective.settled_heads.named_parameters())
    other = Class(section(kind="sskd", head_rounds=2))
    other.objective.load_state_dict(objective.state_dict())
    assert torch.equal(other.losses(batch(5, at=(2, 0), views=4)).terms["ss"], losses.terms["ss"])


def test_sskd_without_self_supervision_has_no_heads() -> None:
    learner = Class(section(kind="sskd", ss=0.0))
    assert list(learner.losses(batch(5, views=4)).terms) == ["kl", "tf"]
    assert not list(learner.objective.parameters())


def test_sskd_wants_four_versions() -> None:
    with pytest.raises(ValueError, match=r"holds 2 version\(s\) of each image, sskd needs 4"):
        Class(section(kind="sskd")).losses(batch(5, views=2))
    maker = make_views(section(kind="sskd"), ALONE, Randomness(0), 3)
    assert maker is not None
    given = batch(3, views=4)
    upright = given.images_NCHW[:3]
    assert torch.equal(torch.cat([upright, *maker(upright, given.slots_N, 0, 0)]), given.images_NCHW)
    assert torch.equal(given.images_NCHW[3:6].rot90(3, (2, 3)), upright)  # a quarter and three make a whole turn
    assert make_views(ObjectiveSpec(), ALONE, Randomness(0), 3) is None


# -------------------------------------------------------------------------------------------------------- recipes


def recipe(source: str = "stream", **objective: object) -> dict[str, object]:
    sources = {
        "stream": {"kind": "stream", "reader": {"shards": "data/shards/x"}},
        "generative": {"kind": "generative", "loss": {"bn": 1.0}},
    }
    return {
        "name": "r",
        "method": "m",
        "image": {"size": 8, "channels": 3},
        "num_classes": 5,
        "batch": 8,
        "rounds": {"main": 2},
        "teachers": [{"name": "t0", "weights": "random", "arch": "tiny"}],
        "student": {"arch": "tiny"},
        "source": sources[source],
        "objective": objective,
    }


@pytest.mark.parametrize("kind", ["distillation", "noisy", "sskd"])
def test_a_kind_reads(kind: str) -> None:
    assert parse(Recipe, recipe(kind=kind)).objective.kind == kind
    assert parse(Recipe, recipe()).objective == ObjectiveSpec()


KINDS = "did you mean 'noisy'?; allowed: distillation, noisy, sskd, kd3"
KEYS = "did you mean 'accuracy'?; allowed: accuracy, kind, kl, kl_scale, noise_rate, noisy, temperature"
WRONG: list[tuple[dict[str, object], str]] = [
    ({"kind": "nosy"}, f"objective.kind: unknown kind (given: 'nosy'); {KINDS}"),
    ({"kind": "noisy", "acuracy": 0.5}, f"objective.acuracy: unknown key (given: 0.5); {KEYS}"),
    ({"rkd": 1.0}, "objective.rkd: unknown key (given: 1.0); did you mean 'rkd_d'?"),
    ({"kind": "noisy", "accuracy": 1.0}, "objective.accuracy: Input should be less than 1 (given: 1.0)"),
    ({"kind": "noisy", "kl": 0.0, "noisy": 0.0}, "objective: all weights are 0; give kl or noisy"),
    ({"kind": "sskd", "kl": 0.0, "tf": 0.0, "ss": 0.0}, "objective: all weights are 0; give at least one of kl"),
    ({"contrast": {"momentum": 2.0}}, "objective.contrast.momentum: "),
    ({"fitnet": {"layer": "x"}}, "objective.fitnet.layer: unknown key"),
]


@pytest.mark.parametrize(("objective", "line"), WRONG)
def test_a_wrong_objective_is_named(objective: dict[str, object], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, recipe(**objective))
    (found,) = str(caught.value).splitlines()[1:]
    assert found.strip().startswith(line)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"crd": 1.0}, "objective.crd is 1, but source.kind is 'generative'"),
        ({"kind": "sskd"}, "source.kind is 'generative'; objective.kind: sskd compares rotated versions"),
    ],
)
def test_what_only_a_stream_can_serve(objective: dict[str, object], said: str) -> None:
    parse(Recipe, recipe(**objective))
    with pytest.raises(RecipeError, match=said):
        parse(Recipe, recipe("generative", **objective))


def test_sskd_relates_at_least_two_images() -> None:
    with pytest.raises(RecipeError, match=r"batch is 1; objective.ss > 0 relates images"):
        parse(Recipe, recipe(kind="sskd") | {"batch": 1})


def test_an_assistants_objective_is_plain() -> None:
    source = {"kind": "generative", "loss": {"adv": 1.0}, "adversary": {"against": "assistant"}}
    tree = recipe("generative") | {"source": source | {"assistant": {"objective": {"kind": "noisy"}}}}
    with pytest.raises(RecipeError, match=r"source.assistant.objective.kind: Input should be 'distillation'"):
        parse(Recipe, tree)
