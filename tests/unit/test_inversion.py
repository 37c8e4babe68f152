"""DeepInversion against its loop written out; the source: rounds, harvest, what the student gets; what is refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfkd_dist.config import DeepInversionSpec, Recipe, RecipeError, parse
from dfkd_dist.data.pixels import to_image_space, to_uint8
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.finished import open_finished
from dfkd_dist.engine.look.named import Finder
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_probe import measured_rate
from dfkd_dist.engine.plan_trace import MAIN, WARM_UP
from dfkd_dist.engine.report import formulas, image_passes
from dfkd_dist.engine.run import run
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.signals import BN, LOGITS
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.launch import LaunchFacts
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis.deepinversion import DeepInversion, normalisation, rise_and_fall
from tests import recipes
from tests.unit.test_plan import measured_peak

Tree = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)


def made(teachers: list[Tree], folder: Path, **changes: Any) -> Build:
    return build(parse(Recipe, recipes.inversion(teachers, **{"out": str(folder / "run"), **changes})), CPU)


def source_of(built: Build) -> InversionSource:
    assert isinstance(built.source, InversionSource)
    return built.source


def synthesis(built: Build) -> DeepInversion:
    found = source_of(built).synthesisers[0]
    assert isinstance(found, DeepInversion)
    return found


def one_round(built: Build, round: int, each: Any = lambda step: None) -> tuple[Tensor, Tensor]:
    """Iterations of the first teacher's synthesis, as the trainer makes them, and its harvest."""
    synthesiser, student = synthesis(built), built.side.network
    for step in range(synthesiser.steps(round)):
        for player, losses in synthesiser.step(round, step, student, False):
            player.backward(losses.total)
            player.step()
        each(step)
    return synthesiser.harvest(round, student)


# ------------------------------------------------------------------------------------- the loop written out


def _probabilities(logits_NC: Tensor) -> Tensor:
    return (logits_NC / 3.0).softmax(dim=1)


def naive_round(built: Build, round: int, js: float) -> tuple[Tensor, Tensor]:
    """DeepInversion with plain tensors and torch's Adam: the images, and the last loss."""
    recipe, bench = built.recipe, synthesis(built).bench
    spec = recipe.source.synthesis  # type: ignore[union-attr]
    teacher, student, drawn = bench.teacher, built.side.network.eval(), bench.randomness
    mean, std = teacher.preprocess.mean.double(), teacher.preprocess.std.double()
    own, name = torch.arange(7), bench.name
    labels_N = (own + 7 * round) % recipes.CLASSES
    x = drawn.normal("pixels", own, (3, 8, 8), owner=name, round=round, dtype=torch.float64)
    step, loss = 0, torch.zeros(())
    for stage in spec.stages:
        x = x.detach().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=spec.lr, betas=tuple(spec.betas))
        for i in range(stage.iterations):
            after = i - spec.warmup
            rate = 1.0 if i < 1 else 0.5 * (1 + math.cos(math.pi * after / (stage.iterations - spec.warmup)))
            optimizer.param_groups[0]["lr"] = spec.lr * rate
            seen = F.avg_pool2d(x, stage.scale) if stage.scale > 1 else x
            origin = torch.zeros(1, dtype=torch.int64)
            places = 2 * stage.jitter + 1
            offsets = drawn.integers("jitter", origin, places, (2,), owner=name, round=round, step=step)[0]
            seen = torch.roll(seen, [int(n) - stage.jitter for n in offsets], dims=(2, 3))
            if drawn.integers("flip", origin, 2, (1,), owner=name, round=round, step=step)[0, 0]:
                seen = seen.flip(3)
            said = teacher.network(seen)  # in its normalised space: no preprocessing
            heard = teacher(seen * std + mean, frozenset({LOGITS, BN}), scaled=True)
            loss = F.cross_entropy(said, labels_N)
            for n, layer in enumerate(heard.bn):
                norms = (layer.mean_C - layer.stored_mean_C).norm() + (layer.var_C - layer.stored_var_C).norm()
                loss = loss + (10.0 if n == 0 else 1.0) * norms
            ways = [seen[..., :-1] - seen[..., 1:], seen[..., :-1, :] - seen[..., 1:, :]]
            ways += [seen[..., 1:, :-1] - seen[..., :-1, 1:], seen[..., :-1, :-1] - seen[..., 1:, 1:]]
            loss = loss + 1e-3 * sum(d.norm() for d in ways) + 1e-2 * sum(d.abs().mean() for d in ways)
            loss = loss + 1e-3 * seen.flatten(1).norm(dim=1).mean()
            if js:
                other = student(seen * std + mean, scaled=True).logits_NC
                p, q = _probabilities(other), _probabilities(said)
                m = (0.5 * (p + q)).clamp(0.01, 0.99)
                p, q = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99)
                gap = 0.5 * (m * (m / p).log() + m * (m / q).log()).sum() / 7
                loss = loss + js * (1 - gap.clamp(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                x.copy_(x.clamp(-mean / std, (1 - mean) / std))
            step += 1
    return x.detach() * std + mean, loss.detach()


@pytest.mark.parametrize("round", [0, 1])
def test_a_round_is_the_published_loop(round: int, teachers: list[Tree], tmp_path: Path) -> None:
    """Round 0 is warm-up, without the competition."""
    built = made(teachers[:1], tmp_path)
    expected, _ = naive_round(built, round, js=2.0 * round)
    images_NCHW, labels_N = one_round(built, round)
    assert torch.allclose(images_NCHW, expected, rtol=0, atol=1e-10)
    assert labels_N.tolist() == [(n + 7 * round) % recipes.CLASSES for n in range(7)]
    assert images_NCHW.min() >= -1e-12 and images_NCHW.max() <= 1 + 1e-12


def test_the_competition_is_at_work_in_that_test(teachers: list[Tree], tmp_path: Path) -> None:
    built = made(teachers[:1], tmp_path)
    images, without = (naive_round(built, 1, js=js)[0] for js in (2.0, 0.0))
    assert (images - without).abs().max() > 1e-4


def test_a_grey_teacher_of_another_size_on_colour_images(teachers: list[Tree], tmp_path: Path) -> None:
    built = made(teachers[1:], tmp_path)
    images_NCHW, _ = one_round(built, 1)
    assert images_NCHW.shape == (7, 3, 8, 8) and images_NCHW.isfinite().all()


def test_normalisation_for_other_channels() -> None:
    grey, colour = Preprocess(8, 1, [0.3], [0.5]), Preprocess(8, 3, [0.1, 0.2, 0.6], [0.2, 0.3, 0.4])
    assert [v.flatten().tolist() for v in normalisation(grey, 3)] == [pytest.approx([0.3] * 3), [0.5] * 3]
    assert [v.flatten().tolist() for v in normalisation(colour, 1)] == [pytest.approx([0.3])] * 2
    assert torch.equal(normalisation(colour, 3)[0], colour.mean[0])


def test_the_schedule() -> None:
    factor = rise_and_fall(10, 4, cosine=True)
    found = [factor(i / 10) for i in range(10)]
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    constant = rise_and_fall(10, 2, cosine=False)
    assert [constant(i / 10) for i in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]


def test_the_loss_falls_and_the_teacher_sees_the_labels(teachers: list[Tree], tmp_path: Path) -> None:
    """Over a hundred iterations the loss falls and the teacher sees the labels."""
    synthesis_of = {"stages": [{"iterations": 100}], "flip": False, "loss": {"ce": 10.0, "js": 0.0}}
    built = made(teachers[:1], tmp_path, source={"synthesis": synthesis_of})
    costs: list[float] = []
    step = DeepInversion.step

    def watched(self: DeepInversion, *given: Any) -> Any:
        for player, losses in step(self, *given):
            costs.append(losses.total.item())
            yield player, losses

    synthesiser = synthesis(built)
    synthesiser.step = watched.__get__(synthesiser)  # type: ignore[method-assign]
    images_NCHW, labels_N = one_round(built, 0)
    said = synthesiser.bench.teacher(images_NCHW).logits_NC
    assert costs[-1] < 0.8 * costs[0]
    assert (said.argmax(dim=1) == labels_N).double().mean() > 0.8


def test_the_best_batch_is_kept_and_is_no_alias(teachers: list[Tree], tmp_path: Path) -> None:
    changes = {"synthesis": {"keep": "best", "lr": 3.0, "stages": [{"iterations": 12}], "loss": {"js": 0.0}}}
    built = made(teachers[:1], tmp_path, source=changes)
    synthesiser, seen, costs = synthesis(built), [], []
    losses_of = synthesiser._losses

    def watched(*given: Any) -> Any:
        losses = losses_of(*given)
        seen.append(synthesiser._pixels.values.detach().clone())
        costs.append(losses.total.item())
        return losses

    synthesiser._losses = watched  # type: ignore[method-assign]
    images_NCHW, _ = one_round(built, 0)
    best = costs.index(min(costs))
    assert 0 < best < len(costs) - 1, costs  # neither the first nor the last, so that the test can fail
    expected = seen[best] * synthesiser.std_C11 + synthesiser.mean_C11
    assert torch.equal(images_NCHW, expected)


# --------------------------------------------------------------------------------------------- draws


def test_labels(teachers: list[Tree], tmp_path: Path) -> None:
    bench = synthesis(made(teachers[:1], tmp_path)).bench
    balanced = Counter(n for round in range(5) for n in bench.labels("balanced", round).tolist())
    assert set(balanced.values()) == {7}
    random = [bench.labels("random", round).tolist() for round in range(60)]
    assert random[0] != random[1]
    counts = Counter(n for labels in random for n in labels)
    assert set(counts) == set(range(5)) and min(counts.values()) > 55


def test_jitter_goes_both_ways_and_never_further(teachers: list[Tree], tmp_path: Path) -> None:
    bench = synthesis(made(teachers[:1], tmp_path)).bench
    found = Counter(n for step in range(100) for n in bench.one("jitter", 5, 2, 0, step))
    assert set(found) == {0, 1, 2, 3, 4} and min(found.values()) > 20


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch", [5, 11, 64])
def test_which_images_are_drawn_does_not_depend_on_the_ranks(
    world: int, batch: int, teachers: list[Tree], tmp_path: Path
) -> None:
    source = source_of(made(teachers[:1], tmp_path, batch=batch))
    alone, mesh = source.mesh, source.mesh
    type(source.pool).__len__, length = lambda self: 23, type(source.pool).__len__
    try:
        whole = [source._ids(4, step) for step in range(6)]
        parts = []
        for step in range(6):
            for rank in range(world):
                source.mesh = replace(mesh, world=Group(tuple(range(world)), rank))
                parts.append(source._ids(4, step))
            source.mesh = alone
        assert torch.equal(torch.cat(whole), torch.cat(parts))
        ids = torch.cat(whole)[: 23 * (6 * batch // 23)]
        assert set(Counter(ids.tolist()).values()) == {len(ids) // 23}  # every image once before any comes again
        assert not torch.equal(source._ids(5, 0), whole[0])
    finally:
        type(source.pool).__len__ = length  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------- the source


def test_rounds_and_phases(teachers: list[Tree], tmp_path: Path) -> None:
    source = source_of(made(teachers, tmp_path))
    phases = [source.update_phase(0, step) for step in range(source.update_steps(0))]
    assert phases == ["synthesis 1"] * 2 + ["synthesis 2"] * 3 + ["harvest"]
    assert source.update_images(0, 0) == 14
    spec = DeepInversionSpec(kind="deepinversion")
    assert spec.phases() == {"synthesis": 2000} and spec.shortened().phases() == {"synthesis": 1}


def test_the_pool_holds_what_was_harvested_in_order(teachers: list[Tree], tmp_path: Path) -> None:
    built = made(teachers, tmp_path, source={"pool": {"targets": "stored"}})
    taken: list[tuple[str, Tensor, Tensor]] = []
    for synthesiser in source_of(built).synthesisers:
        harvest = synthesiser.harvest

        def watched(
            round: int, student: ImageNetwork, harvest: Any = harvest, name: str = synthesiser.bench.name
        ) -> Any:
            taken.append((name, *harvest(round, student)))
            return taken[-1][1:]

        synthesiser.harvest = watched  # type: ignore[method-assign]
    built.trainer.fit()
    pool = source_of(built).pool
    assert [name for name, *_ in taken] == ["t0", "t1"] * 5 and len(pool) == 70 and not pool.in_memory
    found = pool.read(torch.arange(70))
    images_NCHW = torch.cat([to_uint8(images) for _, images, _ in taken])
    assert torch.equal(found.images_NCHW, images_NCHW)
    assert torch.equal(found.labels_N, torch.cat([labels for *_, labels in taken]))
    assert found.teachers_N.tolist() == ([0] * 7 + [1] * 7) * 5
    whole = to_image_space(images_NCHW, torch.float64)
    expected = torch.stack([teacher(whole).logits_NC for teacher in built.teachers], dim=1)
    assert found.logits_NKC is not None and torch.allclose(found.logits_NKC, expected, atol=1e-10)


@pytest.mark.parametrize("targets", ["asked", "stored"])
def test_what_the_student_gets(targets: str, teachers: list[Tree], tmp_path: Path) -> None:
    """Without augmentation, kept answers are the answers; with it, only the images change."""
    built = made(teachers, tmp_path, source={"pool": {"targets": targets}}, augment={"crop_padding": 0, "flip": False})
    built.trainer.fit()
    source = source_of(built)
    batch = source.batch(4, 1)
    answers = built.trainer.exchange.answers(batch)
    assert batch.count == len(batch.images_NCHW) == 11 and batch.at == (4, 1)
    assert batch.ids_N is not None and batch.slots_N is not None and batch.labels_N is not None
    kept = source.pool.read(batch.ids_N)
    assert torch.equal(batch.images_NCHW, to_image_space(kept.images_NCHW, torch.float64))
    assert torch.equal(batch.labels_N, kept.labels_N) and batch.slots_N.tolist() == list(range(11))
    for answer, teacher in zip(answers, built.teachers, strict=True):
        assert torch.allclose(answer.logits_NC, teacher(batch.images_NCHW).logits_NC, atol=1e-10)


def test_kept_answers_ask_nobody(teachers: list[Tree], tmp_path: Path) -> None:
    built = made(teachers, tmp_path, source={"pool": {"targets": "stored"}})
    built.trainer.fit()
    for teacher in built.teachers:
        teacher.forward = lambda *_: pytest.fail("a teacher was asked")  # type: ignore[method-assign]
    batch = source_of(built).batch(4, 0)
    assert len(built.trainer.exchange.answers(batch)) == 2
    assert not torch.equal(batch.images_NCHW, to_image_space(source_of(built).pool.read(batch.ids_N).images_NCHW))


def test_the_student_is_only_read(teachers: list[Tree], tmp_path: Path) -> None:
    changes = {"synthesis": {"competition": {"batch_norm": "batch"}}}
    built = made(teachers[:1], tmp_path, source=changes)
    before = {name: value.clone() for name, value in built.side.network.state_dict().items()}
    built.side.network.train()
    one_round(built, 1)
    after = built.side.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert built.trainer.student.gradient.eq(0).all() and built.side.network.training


@pytest.mark.parametrize("targets", ["asked", "stored"])
def test_passes_are_counted(targets: str, teachers: list[Tree], tmp_path: Path) -> None:
    built = made(teachers, tmp_path, source={"pool": {"targets": targets}})
    passed: Counter[str] = Counter()
    sealed = [synthesiser.bench.teacher for synthesiser in source_of(built).synthesisers]
    networks = [("teacher", teacher) for teacher in [*built.teachers, *sealed]]
    for name, network in [*networks, ("student", built.side.network)]:
        network.register_forward_hook(lambda _, args, out, name=name: passed.update({name: len(args[0])}))
    built.trainer.fit()
    assert image_passes(built.recipe, built.source.update_steps, 5, built.trainer.student.steps) == passed
    assert formulas(built.recipe)["images"].startswith("1*ce + 1*bn + 0.001*tv")
    assert "js" not in formulas(built.recipe)["images (warm-up)"]


# ------------------------------------------------------------------------------------------- refusals

REFUSED: list[tuple[Tree, str]] = [
    ({"source": {"synthesis": {"loss": dict.fromkeys(("ce", "bn", "tv", "tv_l1", "l2", "js"), 0.0)}}}, "all weights"),
    (
        {"source": {"synthesis": {"loss": {"ce": 0.0, "bn": 0.0, "tv": 0.0, "tv_l1": 0.0, "l2": 0.0}}}},
        "rounds.warmup is 1, but without the student every weight",
    ),
    ({"source": {"synthesis": {"warmup": 2}}}, "warmup is 2; allowed: fewer than the 2"),
    ({"source": {"synthesis": {"stages": [{"iterations": 1, "scale": 3}]}}}, "scale"),
    (
        {"source": {"synthesis": {"warmup": 0, "stages": [{"iterations": 1, "jitter": 8}]}}},
        r"stages.0.jitter is 8; .* 8",
    ),
    ({"image": {"size": 9}, "source": {"synthesis": {"warmup": 0}}}, r"stages.0.scale is 2, which does not divide"),
    ({"source": {"synthesis": {"kind": "other"}}}, "kind"),
    ({"rounds": {"student_steps": "epoch"}}, "source.kind is inversion"),
    ({"source": {"pool": {"memory_gb": 0}}}, "memory_gb"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_wrong_recipe_is_refused(changes: Tree, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(Recipe, recipes.inversion(recipes.random_teachers(1), **changes))


def test_there_must_be_a_teacher() -> None:
    with pytest.raises(RecipeError, match="at least one is needed by source.kind: inversion"):
        parse(Recipe, recipes.inversion([]))


def test_kept_answers_are_logits_alone(teachers: list[Tree], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"targets is stored.*wants map of the teachers; allowed: asked"):
        made(teachers, tmp_path, source={"pool": {"targets": "stored"}}, objective={"vid": 1.0})


def test_a_teacher_without_batch_norm_has_no_bn_term(tmp_path: Path) -> None:
    plain = [{"name": "t0", "weights": "random", "arch": "lenet5"}]
    changes: Tree = {"image": {"size": 32, "channels": 1}, "student": {"arch": "lenet5"}}
    with pytest.raises(RecipeError, match=r"source.synthesis.loss.bn is 1, but teacher t0 \(lenet5\)"):
        made(plain, tmp_path, **changes)


def test_a_resolution_that_a_network_does_not_take_is_refused(teachers: list[Tree], tmp_path: Path) -> None:
    pools, takes_all = ([{"name": "t0", "weights": "random", "arch": arch}] for arch in ("vgg8_bn", "tiny"))
    with pytest.raises(RecipeError, match=r"stages.0.scale: network t0 does not take images of 4 px"):
        made(pools, tmp_path)
    with pytest.raises(RecipeError, match=r"stages.0.scale: network student does not take images of 4 px"):
        made(takes_all, tmp_path, student={"arch": "vgg8_bn"})


# ------------------------------------------------------------------------------------------- afterwards


def test_a_finished_run_shows_its_pool(teachers: list[Tree], tmp_path: Path) -> None:
    """Pictures of the newest images; `dfkd evaluate` finds the pool by its word, and by default."""
    tree = recipes.inversion(teachers, out=str(tmp_path / "run"))
    code, summary = run(parse(Recipe, tree), LaunchFacts(), device="cpu")
    assert code == 0 and summary is not None and summary["image_passes"]["teacher"] > 0
    assert (tmp_path / "run" / "grids" / "end" / "t1.png").is_file()
    assert summary["quality"]["pool"]["overall"]["images"] == 70  # all of them, being fewer than 256 for each teacher
    built = open_finished(tmp_path / "run")
    finder = Finder(built, None)
    assert finder.default_pool() == ["pool"]
    seen = list(finder.find(["pool"]).batches(16))
    pool = source_of(built).pool
    assert torch.equal(torch.cat([batch.images_NCHW for batch in seen]), pool.read(torch.arange(70)).images_NCHW)
    assert len(finder.find(["pool"]).part(9)) == 9
    newest = source_of(built).newest(1, 3)
    assert torch.equal(newest, to_image_space(pool.read(torch.tensor([67, 68, 69])).images_NCHW, torch.float64))


def test_the_plan_has_the_memory_and_the_arithmetic_of_a_real_run(teachers: list[Tree], tmp_path: Path) -> None:
    single = {"train": "fp32", "teacher": "fp32"}
    changes: Tree = {"rounds": {"main": 2}, "precision": single, "source": {"pool": {"memory_gb": 1.0}}}
    recipe = parse(Recipe, recipes.inversion(teachers, out=str(tmp_path / "run"), **changes))
    role = plan(recipe, 1).roles[0]
    counter = FlopCounterMode(display=False)
    with counter:
        built = build(recipe, CPU)
        before = counter.get_total_flops()
        built.trainer.fit()
    rounds = {WARM_UP: 1, MAIN: 2}
    assert counter.get_total_flops() - before == sum(role.total_flops(kind) * rounds[kind] for kind in role.flops)
    assert role.memory.peak == pytest.approx(measured_peak(recipe), rel=0.02)


def test_a_plan_writes_nothing(teachers: list[Tree], tmp_path: Path) -> None:
    """Its probe makes a few real rounds, but fills no shard."""
    recipe = parse(Recipe, recipes.inversion(teachers, out=str(tmp_path / "run")))
    assert measured_rate(recipe, CPU) > 0
    assert not list(tmp_path.iterdir())
