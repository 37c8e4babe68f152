"""MosaicKD on one process: its recipe's checks, who moves in which step, what each player minimises, what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.config import MosaicSpec, Recipe, RecipeError, parse
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.engine import report
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.flops import network_costs
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_probe import measured_rate
from dfkd_dist.engine.plan_trace import dry_recipe, plan_cards
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Batch
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.mosaic import MosaicSource
from tests import recipes, shards

Tree = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tree]:
    """A recipe over teachers and shards that are written once."""
    folder = tmp_path_factory.mktemp("mosaic")
    teachers, images = recipes.write_teachers(folder, 2), shards.write_shards(folder / "shards")

    def make(count: int = 2, **changes: Any) -> Tree:
        return recipes.mosaic(teachers[:count], images, **{"out": str(folder / "run"), **changes})

    return make


def _built(tree: Tree) -> tuple[Build, MosaicSource]:
    found = build(parse(Recipe, tree), CPU)
    assert isinstance(found.source, MosaicSource)
    return found, found.source


# ------------------------------------------------------------------------------------------------ refusals


def test_images_smaller_than_a_patch_are_refused_with_the_recipe(made: Callable[..., Tree]) -> None:
    with pytest.raises(
        RecipeError, match=r"source.discriminator.field is 18, but image.size is only 8; allowed: a patch"
    ):
        parse(Recipe, made(source={"discriminator": {"field": 18}}))


def test_a_stride_beyond_the_map_is_refused_when_it_is_built(made: Callable[..., Tree]) -> None:
    with pytest.raises(RecipeError, match=r"source.discriminator: stride is 3, but field 8 gives 2 x 2 scores"):
        build(parse(Recipe, made(source={"discriminator": {"stride": 3}})), CPU)


def test_fewer_real_images_than_a_batch_are_refused(made: Callable[..., Tree]) -> None:
    with pytest.raises(DatasetError, match=r"fewer"):
        build(parse(Recipe, made(source={"ood_batch": 50})), CPU)


# ------------------------------------------------------------------------------------- who does what when


def test_a_round_is_algorithm_1(made: Callable[..., Tree]) -> None:
    built, source = _built(made(2))
    assert source.update_steps(0) == 2 and built.trainer.student_steps(0) == 2
    assert [source.update_phase(0, step) for step in range(2)] == ["discriminator", "generator"]
    stepped = [[player.name for player, _ in source.update(0, s, built.side.network, False)] for s in range(2)]
    assert stepped == [["discriminator/t0", "discriminator/t1"], ["generator/t0", "generator/t1"]]
    assert source.update_images(0, 0) == 2 * 11


def test_assistants_come_after_the_game(made: Callable[..., Tree]) -> None:
    source = {"adversary": {"against": "assistant"}, "assistant": {"steps": 2}}
    built, made_source = _built(made(1, source=source))
    assert made_source.update_steps(0) == 4
    phases = [made_source.update_phase(0, step) for step in range(4)]
    assert phases == ["discriminator", "generator", "assistant", "assistant"]
    names = [player.name for step in (2, 3) for player, _ in made_source.update(0, step, built.side.network, False)]
    assert names == ["assistant/t0"] * 2


def test_without_a_discriminator_there_is_none_and_nothing_is_read(made: Callable[..., Tree]) -> None:
    source = {"discriminator": None, "loss": {"patch": 0.0}, "reader": None, "ood_batch": 0}
    built, made_source = _built(made(1, source=source))
    assert [player.name for player in made_source.players] == ["generator/t0"]
    assert made_source.update_steps(0) == 1 and made_source.update_phase(0, 0) == "generator"
    assert made_source.patches is None and made_source.beside is None
    built.trainer.fit()


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same(module: torch.nn.Module, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
@pytest.mark.parametrize("step", [0, 1])
def test_others_are_read_only(step: int, batch_norm: str, made: Callable[..., Tree]) -> None:
    """Only the player whose turn it is moves: weights, buffers and gradients of the others stay what they were."""
    modes = {"adversary": {"batch_norm": batch_norm}, "discriminator": {"batch_norm": batch_norm}}
    built, source = _built(made(2, source=modes))
    players: list[Player] = [built.trainer.student, *source.players]
    for player in players:
        player.gradient.fill_(0.125)
    before = {player.name: _state(player.module) for player in players}
    turns = []
    for player, losses in source.update(0, step, built.side.network, True):
        player.backward(losses.total)
        turns.append(player)
    for player in turns:
        player.step()
    moving = {player.name for player in turns}
    for player in players:
        assert _same(player.module, before[player.name]) == (player.name not in moving), player.name
        assert torch.equal(player.gradient, torch.full_like(player.gradient, 0.125)) == (player.name not in moving)
        norms = [n for n in before[player.name] if n.endswith("running_mean")]
        if player.name in moving:
            assert norms and all(not torch.equal(player.module.state_dict()[n], before[player.name][n]) for n in norms)
        assert player.module.training
        assert all(p.requires_grad for p in player.parameters)


# -------------------------------------------------------------------------------------- what is minimised


def _probe(source: MosaicSource, images_NCHW: Tensor, kit: int = 0) -> Tensor:
    """A discriminator's D of every patch, with the statistics of these images, buffers left alone."""
    player = source.kits[kit].discriminator
    assert player is not None
    before = _state(player.module)
    with torch.no_grad():
        scores: Tensor = player.module(images_NCHW)
    player.module.load_state_dict(before)
    return 1 / (1 + (-scores).exp())


def _softmax(logits_NC: Tensor) -> Tensor:
    return logits_NC.exp() / logits_NC.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_discriminators_loss_is_eq_3(reduction: str, made: Callable[..., Tree]) -> None:
    built, source = _built(made(1, source={"discriminator": {"reduction": reduction}}))
    kit = source.kits[0]
    images_NCHW = source._generate(kit, "discriminator", source._own(11), 3, 0)
    assert source.patches is not None
    real = source.patches.read(*divmod(3, source.patches.stream.batches), 3, 0)
    d_real, d_made = _probe(source, real.images_NCHW), _probe(source, images_NCHW)
    ((_, losses),) = source.update(3, 0, built.side.network, True)
    if reduction == "mean":
        expected = -(d_real.log().mean() + (1 - d_made).log().mean())
    else:
        expected = -(d_real.log().sum() / real.count + (1 - d_made).log().sum() / 11) / 2
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses.report["D(real)"].item() == pytest.approx(d_real.mean().item())
    assert losses.report["D(made)"].item() == pytest.approx(d_made.mean().item())


@pytest.mark.parametrize("form", ["non_saturating", "saturating"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_generators_loss_is_written_out(form: str, reduction: str, made: Callable[..., Tree]) -> None:
    """lambda_l L_local + lambda_a H(p(y|G(z))) - lambda_adv KL(T || S) + lambda_b sum p log p."""
    judge = {"form": form, "reduction": reduction}
    built, source = _built(made(1, source={"discriminator": judge, "adversary": {"batch_norm": "eval"}}))
    kit, student = source.kits[0], built.side.network
    images_NCHW = source._generate(kit, "generator", source._own(11), 2, 0)
    d = _probe(source, images_NCHW)
    with torch.no_grad():
        t = _softmax(kit.teacher(images_NCHW).logits_NC)
        student.eval()
        s = _softmax(student(images_NCHW).logits_NC)
        student.train()
    values = -d.log() if form == "non_saturating" else (1 - d).log()
    local = values.mean() if reduction == "mean" else values.sum() / 11
    entropy, kl, p = -(t * t.log()).sum(1).mean(), (t * (t / s).log()).sum(1).mean(), t.mean(0)
    expected = 1.0 * local + 0.5 * entropy - 1.0 * kl + 2.0 * (p * p.log()).sum()
    ((_, losses),) = source.update(2, 1, student, False)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(("images", "alike"), [("fresh", False), ("generator", True)])
def test_whose_images_the_discriminator_learns_from(images: str, alike: bool, made: Callable[..., Tree]) -> None:
    built, source = _built(made(1, source={"discriminator": {"images": images}}))
    seen: list[Tensor] = []
    source.kits[0].generator.module.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    for step in (0, 1):
        list(source.update(4, step, built.side.network, False))
    assert torch.allclose(seen[0], seen[1]) == alike


# ----------------------------------------------------------------------------------------- what is read


def test_real_patches_are_the_files_pixels(made: Callable[..., Tree]) -> None:
    """No augmentation; the same images for every teacher's discriminator; in image space like the made ones."""
    built, source = _built(made(2))
    seen: dict[str, Tensor] = {}
    for player in source.players:
        if player.name.startswith("discriminator"):
            player.module.register_forward_pre_hook(
                lambda module, args, name=player.name: seen.setdefault(name, args[0])
            )
    list(source.update(0, 0, built.side.network, False))
    one, two = seen["discriminator/t0"], seen["discriminator/t1"]
    assert torch.equal(one, two) and one.shape[1:] == (3, 8, 8)
    levels = one * 255
    assert torch.allclose(levels, levels.round(), atol=1e-9) and 0 <= float(one.min()) <= float(one.max()) <= 1


def _plain(source: MosaicSource, number: int) -> Batch:
    assert source.beside is not None
    return source.beside.read(*divmod(number, source.beside.stream.batches), 0, 0)


def test_the_students_batch_joins_made_and_real_images(made: Callable[..., Tree]) -> None:
    built, source = _built(made(2, rounds={"warmup": 1, "main": 5}, source={"warmup_loss": {"patch": 1.0}}))
    batch, real = source.batch(3, 1), _plain(source, (3 - 1) * 2 + 1)
    assert len(batch.images_NCHW) == batch.count == 10 + real.count  # floor(11 / 2) from each of two generators
    assert batch.sections[1].count == real.count == len(real.images_NCHW) > 0
    assert not torch.equal(batch.images_NCHW[10:], real.images_NCHW)  # augmented by (round, step, slot)
    answers = built.trainer.exchange.answers(batch)
    for teacher, answer in zip(built.teachers, answers, strict=True):
        assert torch.allclose(answer.logits_NC, teacher(batch.images_NCHW).logits_NC, atol=1e-9)


def test_without_augmentation_the_real_images_are_those_of_the_stream(made: Callable[..., Tree]) -> None:
    none = {"rotation": 0.0, "crop_padding": 0, "flip": False}
    _, source = _built(made(1, source={"ood_augment": none}))
    for number in (0, 1, 5, 6, 13):
        batch = source.batch(*divmod(number, 2))
        assert torch.equal(batch.images_NCHW[11:], _plain(source, number).images_NCHW)


def test_the_papers_algorithm_shows_the_student_made_images_only(made: Callable[..., Tree]) -> None:
    _, source = _built(made(2, source={"ood_batch": 0}))
    batch = source.batch(0, 0)
    assert source.beside is None and len(batch.images_NCHW) == batch.count == 10 and not batch.sections


def test_a_batch_depends_on_its_number_alone(made: Callable[..., Tree]) -> None:
    (_, one), (_, other) = _built(made(1)), _built(made(1))
    in_order = [one.batch(r, s).images_NCHW for r in range(4) for s in range(2)]
    at_random = {n: other.batch(*divmod(n, 2)).images_NCHW for n in (7, 0, 3, 3, 6)}
    for n, images_NCHW in at_random.items():
        assert torch.equal(images_NCHW, in_order[n])
    assert not torch.equal(in_order[0], in_order[1])


# ------------------------------------------------------------------------------------------ its account


@pytest.mark.parametrize("real", [0, 7])
def test_image_passes_are_those_that_happen(real: int, made: Callable[..., Tree]) -> None:
    warm = {
        "rounds": {"warmup": 1, "main": 3},
        "source": {"warmup_loss": {"ice": 1.0, "patch": 0.0}, "ood_batch": real},
    }
    built, source = _built(recipes.merged(made(2), warm))
    seen = dict.fromkeys(report.image_passes(built.recipe, source.update_steps, 0, 0), 0)

    def count(kind: str) -> Any:
        return lambda _, args: seen.__setitem__(kind, seen[kind] + len(args[0]))

    built.side.network.register_forward_pre_hook(count("student"))
    for kit in source.kits:
        assert kit.discriminator is not None
        networks = {"generator": kit.generator.module, "discriminator": kit.discriminator.module}
        for kind, module in (networks | {"teacher": kit.teacher}).items():
            module.register_forward_pre_hook(count(kind))
        kit.answering.register_forward_pre_hook(count("teacher"))
    built.trainer.fit()
    done = built.trainer
    assert seen == report.image_passes(built.recipe, source.update_steps, done.position.round, done.student.steps)
    assert report.formulas(built.recipe)["discriminator"] == "1*real + 1*fake"
    assert network_costs(built)["discriminator/t0"].flops > 0


# -------------------------------------------------------------------------------------------- selection


class Chooser:
    """A selector of two steps in the first round, which remembers what it was asked."""

    images = 9

    def __init__(self, chosen_N: NDArray[np.bool_]) -> None:
        self.chosen_N, self.done, self.asked = chosen_N, False, 0

    def steps(self, round: int) -> int:
        return 2 if round == 0 else 0

    def score(self, round: int, step: int, student: ImageNetwork) -> None:
        assert round == 0 and step < 2
        self.done = step == 1

    def chosen(self, round: int) -> NDArray[np.bool_]:
        assert self.done
        self.asked += 1
        return self.chosen_N

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": torch.from_numpy(self.chosen_N), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.chosen_N, self.done = state["chosen"].numpy(), state["done"]


def _with_selector(tree: Tree, chosen_N: NDArray[np.bool_]) -> tuple[Build, MosaicSource, Chooser]:
    built, source = _built(tree)
    source.selector = chooser = Chooser(chosen_N)
    source._waiting = True
    return built, source, chooser


def test_a_selection_comes_first_and_both_streams_follow_it(made: Callable[..., Tree]) -> None:
    chosen_N = np.arange(43) % 2 == 0
    built, source, chooser = _with_selector(made(1), chosen_N)
    assert (source.update_steps(0), source.update_steps(1)) == (4, 2)
    phases = [source.update_phase(0, step) for step in range(4)]
    assert phases == ["selection", "selection", "discriminator", "generator"]
    assert [source.update_phase(1, step) for step in range(2)] == ["discriminator", "generator"]
    assert [source.update_images(0, step) for step in range(4)] == [9, 9, 11, 11]
    for step in range(4):
        names = [player.name for player, _ in source.update(0, step, built.side.network, False)]
        assert names == [[], [], ["discriminator/t0"], ["generator/t0"]][step]
    assert source.patches is not None and source.beside is not None and chooser.asked == 1
    for number in range(6):
        for reader in (source.patches, source.beside):
            found = source._real_batch(reader, number, 1, 0)
            assert found.ids_N is not None and bool((found.ids_N % 2 == 0).all())
    assert chooser.asked == 1


def test_a_choice_survives_a_stop(made: Callable[..., Tree]) -> None:
    chosen_N = np.arange(43) % 3 != 0
    built, source, _ = _with_selector(made(1), chosen_N)
    for step in range(2):
        list(source.update(0, step, built.side.network, False))
    state = source.state_dict()
    assert set(state) == {"selection"}
    _, resumed, chooser = _with_selector(made(1), np.zeros(43, dtype=np.bool_))
    resumed.load_state_dict(state)
    assert torch.equal(resumed.batch(2, 1).images_NCHW, source.batch(2, 1).images_NCHW)
    assert chooser.asked == 1 and np.array_equal(chooser.chosen_N, chosen_N)


def test_a_selection_that_leaves_less_than_a_batch_is_refused(made: Callable[..., Tree]) -> None:
    _, source, chooser = _with_selector(made(1), np.arange(43) < 5)
    chooser.done = True
    with pytest.raises(
        DatasetError, match=r"round 0: the selection left 5 samples, fewer than one batch of 11; lower batch, or"
    ):
        source.batch(0, 0)


def test_a_discriminator_learns_where_the_generator_stands_still(made: Callable[..., Tree]) -> None:
    judge = {"field": 4, "optimizer": {"lr": 0.02}}
    rounds = {"main": 40, "student_steps": 1}
    source = {"optimizer": {"lr": 1e-9}, "discriminator": judge, "ood_batch": 0}
    built, made_source = _built(made(1, rounds=rounds, source=source))
    ((_, first),) = made_source.update(0, 0, built.side.network, True)
    built.trainer.fit()
    ((_, last),) = made_source.update(40, 0, built.side.network, True)
    assert last.total.item() < 0.7 * first.total.item()
    assert last.report["D(real)"].item() > last.report["D(made)"].item() + 0.2


@pytest.mark.parametrize("form", ["non_saturating", "saturating"])
def test_a_generator_learns_to_pass_for_real(form: str, made: Callable[..., Tree]) -> None:
    """With the patch term alone, more of its patches pass after 40 rounds against a slow discriminator."""
    weights = {"patch": 1.0, "ice": 0.0, "bce": 0.0, "adv": 0.0}
    judge = {"field": 4, "form": form, "optimizer": {"lr": 1e-6}}
    source = {"loss": weights, "adversary": {"against": "none"}, "discriminator": judge, "ood_batch": 0}
    built, made_source = _built(made(1, rounds={"main": 40, "student_steps": 1}, source=source))
    ((_, first),) = made_source.update(0, 0, built.side.network, True)
    built.trainer.fit()
    ((_, last),) = made_source.update(0, 0, built.side.network, True)
    assert last.report["D(made)"].item() > first.report["D(made)"].item() + 0.01


def test_an_estimate_scores_nothing(made: Callable[..., Tree]) -> None:
    """A selection may mean millions of images: neither a plan nor the probe of this machine's speed makes one."""
    tree = made(1, source={"selection": {"kind": "top", "score": "entropy", "count": 30, "batch": 8}})
    recipe = parse(Recipe, tree)
    dry = dry_recipe(recipe, plan_cards(recipe))
    assert isinstance(dry.source, MosaicSpec) and dry.source.selection is None
    assert measured_rate(recipe, CPU) > 0
    assert plan(recipe, 4).to_json()["roles"]
