"""CMI's and Fast's loops written out with plain torch, one round of one teacher in one process at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.engine.build import Build
from dfkd_dist.sources.inversion import InversionSource

BATCH = 7
Heard = tuple[Tensor, list[tuple[Tensor, Tensor, _BatchNorm]], Tensor]


def first_synthesis(built: Build) -> Any:
    """That of the first teacher."""
    assert isinstance(built.source, InversionSource)
    return built.source.synthesisers[0]


def one_round(built: Build, round: int, each: Callable[[int], None] = lambda step: None) -> tuple[Tensor, Tensor]:
    """Iterations of the first teacher's synthesis, as the trainer makes them, and its harvest."""
    synthesiser, student = first_synthesis(built), built.side.network
    for step in range(synthesiser.steps(round)):
        played = []
        for player, losses in synthesiser.step(round, step, student, False):
            player.backward(losses.total)
            played.append(player)
        for player in played:
            player.step()
        each(step)
    return synthesiser.harvest(round, student)


class Written:
    """What both loops share: draws, what the teacher says, and the terms.

    Args:
        built: a run of one teacher; nothing of it is changed.
    """

    def __init__(self, built: Build) -> None:
        bench = first_synthesis(built).bench
        self.built, self.spec, self.drawn, self.name = built, first_synthesis(built).spec, bench.randomness, bench.name
        self.teacher, self.warmup = bench.teacher, built.recipe.rounds.warmup
        self.student = copy.deepcopy(built.side.network).eval()
        self.own = torch.arange(BATCH)

    def normal(self, purpose: str, round: int, *shape: int) -> Tensor:
        return self.drawn.normal(purpose, self.own, shape, owner=self.name, round=round, dtype=torch.float64)

    def labels(self, round: int) -> Tensor:
        classes = self.built.recipe.num_classes
        return self.drawn.integers("labels", self.own, classes, owner=self.name, round=round)

    def view(self, images: Tensor, spec: AugmentSpec, which: str, round: int, step: int) -> Tensor:
        draws = self.drawn.uniform(
            f"view/{which}", self.own, (num_uniforms(spec),), owner=self.name, round=round, step=step,
            dtype=torch.float64,
        )  # fmt: skip
        return augment(images, draws, spec)

    def hear(self, images: Tensor) -> Heard:
        """Logits, each batch norm's mean and biased variance, and all its inputs' spatial means side by side."""
        moments: list[tuple[Tensor, Tensor, _BatchNorm]] = []
        means: list[Tensor] = []

        def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            assert isinstance(norm, _BatchNorm)
            mean = x.sum(dim=(0, 2, 3)) / (x.numel() / x.shape[1])
            moments.append((mean, ((x - mean.view(1, -1, 1, 1)) ** 2).mean(dim=(0, 2, 3)), norm))
            means.append(x.mean(dim=(2, 3)))

        with ExitStack() as hooks:
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):
                    hooks.callback(module.register_forward_pre_hook(note).remove)
            logits = self.teacher(images).logits_NC
        return logits, moments, torch.cat(means, dim=1)

    def adversary(self, images: Tensor, logits: Tensor) -> Tensor:
        """-KL(teacher || student) of the images on which they choose the same class, over all images."""
        other = self.student(images).logits_NC
        agree = logits.argmax(dim=1) == other.argmax(dim=1)
        kl = F.kl_div(other.log_softmax(dim=1), logits.softmax(dim=1), reduction="none").sum(dim=1)
        return -(kl * agree).sum() / BATCH

    def plays(self, round: int) -> bool:
        begins = self.warmup if self.spec.adv_from is None else self.spec.adv_from
        return bool(round >= begins)

    def weight(self, name: str, round: int, shape: torch.Size) -> Tensor:
        """A fresh weight around 0."""
        first = torch.zeros(1, dtype=torch.int64)
        return (
            0.02
            * self.drawn.normal(
                f"weights/{name}", first, tuple(shape), owner=self.name, round=round, dtype=torch.float64
            )[0]
        )


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules' weights agree to rounding."""
    other = b.state_dict()
    return all(torch.allclose(value, other[name], rtol=0, atol=1e-11) for name, value in a.state_dict().items())
