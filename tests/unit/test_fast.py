"""Fast against its loop written out: three meta-gradients, statistics averaged over rounds, every boundary."""

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

from dfkd_dist.config import AugmentSpec, FastSpec, Recipe, RecipeError, parse
from dfkd_dist.engine.build import Build, build
from dfkd_dist.sources.synthesis.fast import Fast
from tests import recipes
from tests.latent import BATCH, Written, equal, first_synthesis, one_round

Tree = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return recipes.write_teachers(tmp_path_factory.mktemp("teachers"), 1)


@pytest.fixture
def made(teachers: list[Tree], tmp_path: Path) -> Callable[..., Build]:
    def make(method: Callable[..., Tree] = recipes.fast, **synthesis: Any) -> Build:
        tree = method(teachers, out=str(tmp_path / "run"), source={"synthesis": synthesis})
        return build(parse(Recipe, tree), CPU)

    return make


def synthesis(built: Build) -> Fast:
    found = first_synthesis(built)
    assert isinstance(found, Fast)
    return found


class WrittenFast(Written):
    """FastMeta as its released code goes about it: CIFAR's fresh latents, or ImageNet's persistent ones."""

    def __init__(self, built: Build, shape: tuple[int, ...]) -> None:
        super().__init__(built)
        self.shape = shape
        self.theta = copy.deepcopy(synthesis(built).theta.module)
        self.rate = self.spec.meta.lr or self.spec.lr * self.spec.iterations
        self.theta_adam = torch.optim.Adam(self.theta.parameters(), self.rate, (0.5, 0.999))
        self.origin: Tensor | None = None
        self.average: list[tuple[Tensor, Tensor]] = []
        self.boundaries: set[str] = set()

    def begin(self, round: int) -> Tensor:
        """What the latents begin from; theta's first layer, where it is time."""
        if round == self.spec.reset_at:
            self.boundaries.add("reset")
            parts = [(n, m) for n, m in self.theta.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            norms = [(n, m) for n, m in self.theta.named_modules() if isinstance(m, _BatchNorm)]
            for name, module in (parts[0], norms[0]):
                module.weight.data = self.weight(name, round, module.weight.shape)
                if module.bias is not None:
                    module.bias.data = torch.zeros_like(module.bias)
        fresh = self.normal("latents", round, *self.shape)
        if self.spec.latents == "fresh":
            return fresh
        again = self.spec.redraw_every > 0 and (round + 1) % self.spec.redraw_every == 0
        if self.origin is None or again:
            self.boundaries.add("redraw") if again else None
            self.origin = fresh.clone().requires_grad_()
            self.theta_adam = torch.optim.Adam(self.theta.parameters(), self.rate, (0.5, 0.999))
            self.origin_adam = torch.optim.Adam([self.origin], self.spec.meta.lr_latents, (0.5, 0.999))
        return self.origin.detach().clone()

    def statistics(self, moments: list[tuple[Tensor, Tensor, _BatchNorm]]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        m = self.spec.bn_momentum
        for n, (mean, var, norm) in enumerate(moments):
            if self.average:
                mean = (1 - m) * mean + m * self.average[n][0]
                var = (1 - m) * var + m * self.average[n][1]
            total = total + (norm.running_mean - mean).norm() + (norm.running_var - var).norm()
        return total

    def remember(self, moments: list[tuple[Tensor, Tensor, _BatchNorm]]) -> None:
        m = self.spec.bn_momentum
        latest = [(mean.detach(), var.detach()) for mean, var, _ in moments]
        if m == 0:
            return
        if not self.average:
            self.average = latest
            return
        self.average = [
            (m * old[0] + (1 - m) * new[0], m * old[1] + (1 - m) * new[1])
            for old, new in zip(self.average, latest, strict=True)
        ]

    def round(self, round: int) -> Tensor:
        """The images that are kept."""
        z, labels = self.begin(round).requires_grad_(), self.labels(round)
        phi = copy.deepcopy(self.theta)
        adam = torch.optim.Adam(
            [{"params": phi.parameters()}, {"params": [z], "lr": self.spec.lr_latents}], self.spec.lr, (0.5, 0.999)
        )
        best: tuple[float, Tensor] | None = None
        sums = [torch.zeros_like(p) for p in [*phi.parameters(), z]]
        for step in range(self.spec.iterations):
            images = phi(z)
            seen = self.view(images, self.spec.view, "global", round, step)
            logits, moments, _ = self.hear(seen)
            loss = 0.5 * F.cross_entropy(logits, labels) + self.statistics(moments)
            if self.plays(round):
                self.boundaries.add("warm-up" if round < self.warmup else "main")
                loss = loss + 5.0 * self.adversary(seen, logits)
            if best is None or self.spec.keep == "last" or loss.item() < best[0]:
                best = loss.item(), images.detach().clone()
            adam.zero_grad()
            loss.backward()
            for total, p in zip(sums, [*phi.parameters(), z], strict=True):
                assert p.grad is not None
                total.copy_(p.grad if self.spec.meta.gradient == "last" else total + p.grad)
            adam.step()
        self.learn(phi, z, sums)
        self.remember(moments)
        assert best is not None
        return best[1]

    def learn(self, phi: nn.Module, z: Tensor, sums: list[Tensor]) -> None:
        slow = [*self.theta.parameters(), *([self.origin] if self.origin is not None else [])]
        copies = [*phi.parameters(), *([z] if self.origin is not None else [])]
        for own, other, total in zip(slow, copies, sums[: len(slow)], strict=True):
            reptile = self.spec.meta.scale * (own.detach() - other.detach())
            own.grad = reptile if self.spec.meta.gradient == "reptile" else total
        self.theta_adam.step()
        if self.origin is not None:
            self.origin_adam.step()


CASES: dict[str, tuple[Callable[..., Tree], Tree, set[str]]] = {
    "sum": (recipes.fast, {}, {"warm-up", "main", "reset"}),
    "last": (
        recipes.fast,
        {"meta": {"gradient": "last", "lr": 0.02}, "bn_momentum": 0.0},
        {"warm-up", "main", "reset"},
    ),
    "reptile": (recipes.fast, {"meta": {"gradient": "reptile"}, "adv_from": None, "reset_at": None}, {"main"}),
    "imagenet": (recipes.fast_of_imagenet, {}, {"warm-up", "main", "reset", "redraw"}),
    "imagenet, sum": (
        recipes.fast_of_imagenet,
        {"meta": {"gradient": "sum"}, "keep": "best", "redraw_every": 0},
        {"warm-up", "main", "reset"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_equal_the_loop_written_out(case: str, made: Callable[..., Build]) -> None:
    """Six rounds: before the adversary, in the warm-up with it, after the warm-up, after the reset, and on."""
    method, changes, boundaries = CASES[case]
    built = made(method, **changes)
    written = WrittenFast(built, synthesis(built).theta.module.latent_shape)
    for round in range(6):
        expected = written.round(round)
        images, labels = one_round(built, round)
        assert images.shape == (BATCH, 3, 8, 8) and torch.equal(labels, written.labels(round))
        assert torch.allclose(images, expected, rtol=0, atol=1e-10), round
        # Running statistics of theta never move: its copies make the images.
        assert equal(synthesis(built).theta.module, written.theta), round
    assert written.boundaries == boundaries


def test_latents_that_persist_are_drawn_anew_at_their_rounds(made: Callable[..., Build]) -> None:
    built = made(recipes.fast_of_imagenet, redraw_every=3)
    assert isinstance(built.recipe.source.synthesis, FastSpec)  # type: ignore[union-attr]
    starts: list[Tensor] = []
    for round in range(4):
        module = synthesis(built).phi.module
        hook = module.register_forward_pre_hook(lambda _, args: starts.append(args[0].detach().clone()))
        one_round(built, round, lambda step, hook=hook: hook.remove())
    own = torch.arange(BATCH)
    drawn = [
        synthesis(built).bench.randomness.normal("latents", own, (12, 2, 2), owner="t0", round=r, dtype=torch.float64)
        for r in range(4)
    ]
    fresh = [[torch.equal(start, z) for z in drawn] for start in starts]
    assert fresh == [[True] + 3 * [False], 4 * [False], [False, False, True, False], 4 * [False]]


def test_a_reset_leaves_all_but_the_first_layers(made: Callable[..., Build]) -> None:
    built = made(reset_at=0)
    theta = synthesis(built).theta.module
    before = {name: value.clone() for name, value in theta.state_dict().items()}
    synthesis(built)._begin(0)
    changed = {name for name, value in theta.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"linear.weight", "linear.bias", "norm.weight"}  # the norm's bias was 0 already
    assert float(theta.state_dict()["norm.weight"].abs().max()) < 0.1


def test_defaults_are_those_of_the_released_code() -> None:
    spec = FastSpec(kind="fast")
    assert (spec.iterations, spec.lr, spec.lr_latents, spec.bn_momentum) == (10, 2e-3, 0.01, 0.9)
    assert spec.loss.weights() == {"bn": 10.0, "ce": 0.4, "oh": 0.0, "adv": 1.1}
    assert (spec.meta.gradient, spec.meta.scale, spec.meta.lr) == ("sum", 67.0, None)
    assert spec.view == AugmentSpec(crop_padding=4, flip=True)
    assert [spec.weights_in(round, 20)["adv"] for round in (0, 19, 20)] == [0.0, 0.0, 1.1]
    later = FastSpec(kind="fast", adv_from=19)
    assert [later.weights_in(round, 20)["adv"] for round in (18, 19, 20)] == [0.0, 1.1, 1.1]
    redrawn = FastSpec(kind="fast", latents="persistent", redraw_every=50)
    assert [round for round in range(150) if redrawn.redraws(round)] == [49, 99, 149]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"redraw_every": 5}, "redraw_every is 5, but latents: fresh are drawn in every round anyway"),
        ({"bn_momentum": 1.0}, "bn_momentum"),
        ({"adversary": {"against": "none"}}, "loss.adv is 5 but adversary.against is none"),
        ({"meta": {"gradient": "maml"}}, "meta.gradient"),
    ],
)
def test_recipes_that_make_no_sense(changes: Tree, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(Recipe, recipes.fast(recipes.random_teachers(1), source={"synthesis": changes}))


def test_latents_with_places_are_no_generative_sources() -> None:
    tree = recipes.dfq(recipes.random_teachers(1), source={"generator": {"style": "spatial"}})
    with pytest.raises(RecipeError, match="generator.style is spatial.*allowed: upsample, dcgan"):
        parse(Recipe, tree)
