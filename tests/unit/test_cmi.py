"""CMI against its loop written out; its bank, its assistants, its state; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.config import ASSISTANT, HARVEST, SYNTHESIS, Recipe, RecipeError, parse
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.flops import network_costs
from dfkd_dist.engine.report import formulas, image_passes
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis.bank import Bank
from dfkd_dist.sources.synthesis.cmi import CMI
from tests import recipes
from tests.latent import BATCH, Written, equal, first_synthesis, one_round

Tree = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 2)


@pytest.fixture
def made(teachers: list[Tree], tmp_path: Path) -> Callable[..., Build]:
    def make(count: int = 1, method: Callable[..., Tree] = recipes.cmi, **changes: Any) -> Build:
        return build(parse(Recipe, method(teachers[:count], **{"out": str(tmp_path / "run"), **changes})), CPU)

    return make


def synthesis(built: Build) -> CMI:
    found = first_synthesis(built)
    assert isinstance(found, CMI)
    return found


# ------------------------------------------------------------------------------------- the loop written out


class WrittenCMI(Written):
    """CMI as its released code goes about it."""

    def __init__(self, built: Build) -> None:
        super().__init__(built)
        self.generator = copy.deepcopy(synthesis(built).generator.module)
        head = synthesis(built).head
        assert head is not None
        self.head = copy.deepcopy(head.module)
        self.head_adam = torch.optim.Adam(self.head.parameters(), 0.01)
        self.bank: list[Tensor] = []

    def reset(self, round: int) -> None:
        for name, module in self.generator.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | _BatchNorm):
                drawn = self.weight(name, round, module.weight.shape)
                module.weight.data = 1.0 + drawn if isinstance(module, _BatchNorm) else drawn
                if module.bias is not None:
                    module.bias.data = torch.zeros_like(module.bias)

    def round(self, round: int) -> tuple[Tensor, float]:
        """The best images and their loss."""
        self.reset(round)
        z, labels = self.normal("latents", round, 12).requires_grad_(), self.labels(round)
        adam = torch.optim.Adam([*self.generator.parameters(), z], 0.02, (0.5, 0.999))
        best: tuple[float, Tensor, Tensor] | None = None
        for step in range(3):
            images = self.generator(z)
            seen = self.view(images, self.spec.global_view, "global", round, step)
            logits, moments, of_global = self.hear(seen)
            of_local = self.hear(self.view(images, self.spec.local_view, "local", round, step))[2]
            loss = 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, logits.argmax(dim=1))
            for mean, var, norm in moments:
                loss = loss + (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
            if self.plays(round):
                loss = loss + 5.0 * self.adversary(seen, logits)
            loss = loss + 0.8 * self.contrast(of_local, of_global, round, step)
            if best is None or loss.item() < best[0]:
                best = loss.item(), images.detach().clone(), torch.cat([of_local, of_global], dim=1).detach()
            adam.zero_grad()
            self.head_adam.zero_grad()
            loss.backward()
            adam.step()
            self.head_adam.step()
        assert best is not None
        self.bank = [*self.bank, *best[2]][-17:]
        return best[1], best[0]

    def contrast(self, of_local: Tensor, of_global: Tensor, round: int, step: int) -> Tensor:
        places = self.places()
        order = self.drawn.permutation("bank", len(places), owner=self.name, round=round, step=step)[:11]
        remembered = [places[i] for i in order.tolist()]
        width = of_local.shape[1]
        local = torch.cat([of_local, *[row[None, :width] for row in remembered]])
        other = torch.cat([of_global, *[row[None, width:] for row in remembered]])
        a, b = (F.normalize(self.head(x), dim=1) for x in (local, other))
        losses = F.cross_entropy(a @ b.detach().T / 0.1, torch.arange(len(a)), reduction="none")
        return losses[:BATCH].mean() + (losses[BATCH:].mean() if remembered else 0.0)

    def places(self) -> list[Tensor]:
        """The newest 17 rows as a ring holds them."""
        rounds = getattr(self, "rounds", 0)
        ring: dict[int, Tensor] = {}
        for row, number in zip(self.bank, range(BATCH * rounds - len(self.bank), BATCH * rounds), strict=True):
            ring[number % 17] = row
        return [ring[place] for place in sorted(ring)]


def test_rounds_equal_the_loop_written_out(made: Callable[..., Build]) -> None:
    """Four rounds, so that the bank wraps; the first one warms up, and has nothing to remember."""
    built = made(source={"synthesis": {"contrast": {"temperature": 0.1}}})
    written, costs = WrittenCMI(built), []
    for round in range(4):
        written.rounds = round  # type: ignore[attr-defined]
        expected, cost = written.round(round)
        cost_seen: list[float] = []
        images, labels = one_round(built, round, lambda step, into=cost_seen: into.append(_best_cost(built)))
        assert torch.allclose(images, expected, rtol=0, atol=1e-10), round
        assert torch.equal(labels, written.labels(round))
        assert cost_seen[-1] == pytest.approx(cost, rel=1e-10)
        costs.append(cost_seen)
        head = synthesis(built).head
        assert head is not None and equal(head.module, written.head)
        assert equal(_weights_only(synthesis(built).generator.module), _weights_only(written.generator))
    assert any(seen[0] > seen[-1] for seen in costs)  # it is not always the first that is best


def _best_cost(built: Build) -> float:
    cost = synthesis(built)._best.cost
    assert cost is not None
    return float(cost)


def _weights_only(module: nn.Module) -> nn.Module:
    """A copy whose running statistics, which nobody reads, are those at the start."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
    return copied


def test_the_last_images_can_be_kept(made: Callable[..., Build]) -> None:
    built = made(source={"synthesis": {"keep": "last", "loss": {"adv": 0.0}}})
    seen: list[Tensor] = []
    module = synthesis(built).generator.module
    module.register_forward_hook(lambda _, __, images: seen.append(images.detach()))
    images, _ = one_round(built, 0)
    assert len(seen) == 3 and torch.equal(images, seen[-1])


def test_every_round_has_a_generator_of_its_own(made: Callable[..., Build]) -> None:
    built, other = made(), made()
    for round in range(2):
        one_round(built, round)
    images, _ = one_round(built, 2)
    # Nothing of earlier rounds is in the generator; they reach this one through head and bank alone.
    changes = {"synthesis": {"loss": {"cr": 0.0}}}
    built, other = made(source=changes), made(source=changes)
    assert built.source.players == [synthesis(built).generator]
    one_round(built, 0)
    assert torch.equal(one_round(built, 1)[0], one_round(other, 1)[0])
    assert not torch.equal(images, one_round(other, 2)[0])


# ------------------------------------------------------------------------------------------------ the bank


def test_a_bank_forgets_the_oldest(made: Callable[..., Build]) -> None:
    bank = Bank(synthesis(made()).bench, 5)
    assert bank.count(3) == 0 and bank.state_dict() == {}
    rows = torch.arange(9.0)[:, None]
    bank.add(rows[:4])
    assert (bank.count(9), bank.count(2)) == (4, 2)
    assert bank.rows(torch.arange(4))[:, 0].tolist() == [0, 1, 2, 3]
    bank.add(rows[4:7])
    assert sorted(bank.rows(torch.arange(5))[:, 0].tolist()) == [2, 3, 4, 5, 6]
    drawn = bank.sample(3, 1, 2)
    assert len(set(drawn.tolist())) == 3 and not torch.equal(drawn, bank.sample(3, 1, 3))
    assert sorted(bank.sample(9, 1, 2).tolist()) == list(range(5))
    again = Bank(bank.bench, 5)
    again.load_state_dict(bank.state_dict())
    for part in (bank, again):
        part.add(rows[7:])
    assert torch.equal(bank.rows(torch.arange(5)), again.rows(torch.arange(5)))
    bank.add(rows)  # more than it holds
    assert sorted(bank.rows(torch.arange(5))[:, 0].tolist()) == [4, 5, 6, 7, 8]
    again.load_state_dict({})
    assert again.count(1) == 0


# ------------------------------------------------------------------------------------------- the assistants


def test_assistants_learn_from_their_teachers_images(made: Callable[..., Build]) -> None:
    built = made(2, recipes.cmi_with_assistants, augment={"flip": False}, source={"assistant": {"steps": 4}})
    source = built.source
    assert isinstance(source, InversionSource) and source.assistants is not None
    asked: dict[str, list[Tensor]] = {"t0": [], "t1": []}
    for pupil in source.assistants.pupils:
        pupil.answering.register_forward_pre_hook(
            lambda module, args: asked[module.name].append(args[0]) if len(args[0]) == 11 else None
        )
    batch_of = type(source).batch
    built.trainer.rounds = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built.trainer.exchange, "answers", lambda batch: pytest.fail("no student step is looked at"))
        patch.setattr(type(built.trainer), "student_steps", lambda self, round: 0)
        built.trainer.fit()
    pool = source.pool.read(torch.arange(len(source.pool)))
    assert batch_of is type(source).batch and pool.teachers_N.tolist() == ([0] * 7 + [1] * 7) * 3
    for k, name in enumerate(("t0", "t1")):
        assert len(asked[name]) == 2 * 4  # none in the warm-up
        own = {tuple(image.flatten().tolist()) for image in pool.images_NCHW[pool.teachers_N == k].double() / 255}
        seen = [tuple(image.flatten().tolist()) for images in asked[name] for image in images]
        assert set(seen) <= own and len(set(seen)) > 14  # of all rounds so far


def test_the_adversary_plays_against_the_assistant(made: Callable[..., Build]) -> None:
    built = made(1, recipes.cmi_with_assistants)
    student, assistant = built.side.network, built.source.assistants.pupils[0].side.network  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in assistant.state_dict().items()}
    looked: list[str] = []
    for name, network in (("student", student), ("assistant", assistant)):
        network.register_forward_hook(lambda *_, name=name: looked.append(name))
    one_round(built, 0)
    assert looked == []  # the warm-up
    one_round(built, 1)
    assert looked == ["assistant"] * 3
    assert all(torch.equal(value, before[name]) for name, value in assistant.state_dict().items())


def test_phases_passes_and_costs(made: Callable[..., Build]) -> None:
    built = made(2, recipes.cmi_with_assistants)
    source = built.source
    assert [source.update_steps(round) for round in (0, 1)] == [4, 6]
    phases = [source.update_phase(1, step) for step in range(6)]
    assert phases == [SYNTHESIS] * 3 + [HARVEST] + [ASSISTANT] * 2
    assert [source.update_images(1, step) for step in (0, 3, 4)] == [14, 14, 22]
    passed = {"teacher": 0, "student": 0, "generator": 0, "assistant": 0}

    def count(kind: str) -> Any:
        return lambda _, args: passed.__setitem__(kind, passed[kind] + len(args[0]))

    assert isinstance(source, InversionSource) and source.assistants is not None
    sealed = [synthesiser.bench.teacher for synthesiser in source.synthesisers]
    watched = [("teacher", teacher) for teacher in [*built.teachers, *sealed]]
    watched += [("assistant", pupil.side.network) for pupil in source.assistants.pupils]
    watched += [("generator", s.generator.module) for s in source.synthesisers if isinstance(s, CMI)]
    for kind, network in [*watched, ("student", built.side.network)]:
        network.register_forward_pre_hook(count(kind))
    built.trainer.fit()
    assert image_passes(built.recipe, source.update_steps, 5, built.trainer.student.steps) == passed
    assert formulas(built.recipe)["images (warm-up)"] == "1*bn + 0.7*ce + 0.3*oh + 0.8*cr"
    assert formulas(built.recipe)["assistant"] == "1*kl + 1*vid at temperature 3"
    costs = network_costs(built)
    assert {"generator/t0", "generator/t1", "assistant/t0", "assistant/t1"} <= costs.keys()
    assert costs["generator/t0"].flops > 0 and costs["assistant/t1"].parameters > 0


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"synthesis": {"adversary": {"against": "none"}}}, "loss.adv is 5 but adversary.against is none"),
        ({"synthesis": {"adversary": {"against": "assistant"}}}, "an `assistant` section is needed"),
        ({"assistant": {"steps": 1}}, "an `assistant` section is needed.*found student"),
        ({"synthesis": {"loss": {n: 0.0 for n in ("bn", "ce", "oh", "adv", "cr")}}}, "loss: all weights are 0"),
        ({"synthesis": {"loss": {"tv": 1.0}}}, "tv"),
        ({"synthesis": {"generator": {"style": "dcgan", "blocks": 4}}}, "style is dcgan.*image.size is 8"),
    ],
)
def test_recipes_that_make_no_sense(changes: Tree, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(Recipe, recipes.cmi(recipes.random_teachers(1), source=changes))


def test_layers_are_looked_for_in_the_teacher(made: Callable[..., Build]) -> None:
    built = made()
    network = synthesis(built).bench.teacher.network
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    other = made(source={"synthesis": {"contrast": {"layers": [name]}}})
    head = synthesis(other).head
    assert head is not None and head.module[0].in_features == 3  # type: ignore[index]
    one_round(other, 1)
    with pytest.raises(RecipeError, match=r"source.synthesis.contrast.layers: teacher t0: .*no module 'layer9'"):
        made(source={"synthesis": {"contrast": {"layers": ["layer9"]}}})


def test_a_teacher_without_batch_norm_has_nothing_to_contrast(teachers: list[Tree], tmp_path: Path) -> None:
    lenet = [{"name": "t0", "weights": "random", "arch": "lenet5", "size": 32, "channels": 1}]
    tree = recipes.cmi(lenet, source={"synthesis": {"loss": {"bn": 0.0}}}, out=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"source.synthesis.loss.cr is 0.8, but teacher t0 .*no batch norm"):
        build(parse(Recipe, tree), CPU)
