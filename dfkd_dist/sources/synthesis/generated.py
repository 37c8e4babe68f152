"""What syntheses by a generator share: its images, their views, and the terms that a teacher judges them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_dist.config import AugmentSpec, CompetitionSpec
from dfkd_dist.config.inversion_latent import LatentSpec
from dfkd_dist.data.augment import augment, num_uniforms
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import Need
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.terms import GeneratorStep, generator_terms, image_terms, need_of

SPREAD = 0.02
"""Standard deviation of weights that are drawn anew."""
Terms = dict[str, Callable[[], Tensor]]


class Judge:
    """Asks the teacher (and the adversary) about views of generated images.

    Args:
        spec: terms and labels.
        bench: whose images.
        assistant: the network that the adversary plays against in the student's place, or None.
    """

    def __init__(self, spec: LatentSpec, bench: Bench, assistant: ImageNetwork | None = None) -> None:
        self.spec, self.bench, self.assistant = spec, bench, assistant

    def view(self, images_NCHW: Tensor, spec: AugmentSpec, purpose: str, round: int, step: int) -> Tensor:
        """A view of each image, drawn for it alone; gradient reaches the images."""
        wanted, bench = num_uniforms(spec), self.bench
        if not wanted:
            return images_NCHW
        uniforms_NP = bench.randomness.uniform(
            f"view/{purpose}", bench.own(), (wanted,), owner=bench.name, round=round, step=step, dtype=bench.dtype
        )
        return augment(images_NCHW, uniforms_NP, spec)

    def ask(
        self, seen_NCHW: Tensor, weights: dict[str, float], round: int, student: ImageNetwork, more: Need = frozenset()
    ) -> GeneratorStep:
        """What the terms with a weight (and `more`) need to know of the images."""
        bench = self.bench
        signals = bench.teacher(seen_NCHW, need_of(weights) | more)
        other_NC = None
        if weights["adv"] > 0:
            opponent = student if self.assistant is None else self.assistant
            other_NC = bench.read(opponent, seen_NCHW, self.spec.adversary.batch_norm)
        labels_N = self.labels(round)
        return GeneratorStep(signals, other_NC, bench.batch, bench.mesh.sync, bench.mesh.row.size, labels_N=labels_N)

    def labels(self, round: int) -> Tensor:
        """`[n]`: what this rank's images of a round are to show."""
        return self.bench.labels(self.spec.labels, round)

    def terms(self, step: GeneratorStep) -> Terms:
        """Name to a function that computes the term."""
        images = image_terms(step, CompetitionSpec(), "image")
        return generator_terms(step, self.spec.bn, self.spec.adversary) | {"ce": images["ce"]}


def images_of(generator: nn.Module, latents: Tensor, bench: Bench) -> Tensor:
    """Images of the row's latents; batch norm sees all of them."""
    with bench.autocast():
        images_NCHW: Tensor = generator(latents)
    return images_NCHW.to(bench.dtype)


def latents(bench: Bench, generator: nn.Module, purpose: str, round: int) -> Tensor:
    """This rank's slice of a batch of standard normal latents."""
    shape = cast(tuple[int, ...], generator.latent_shape)
    return bench.randomness.normal(purpose, bench.own(), shape, owner=bench.name, round=round, dtype=bench.dtype)


def fresh_optimizer(player: Player) -> None:
    """Forget the moments, as a new optimiser would."""
    player.optimizer.state.clear()


def draw_weights(module: nn.Module, randomness: Randomness, owner: str, round: int) -> None:
    """Draw all weights anew: normal around 0 (batch norm's scale around 1) with deviation 0.02, and biases 0.

    The same on every rank, in any round that it is asked for.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
            _draw(part, 1.0, name, randomness, owner, round)
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            _draw(part, 0.0, name, randomness, owner, round)


def draw_first_layer(module: nn.Module, randomness: Randomness, owner: str, round: int) -> None:
    """Draw the first layer and the batch norm behind it anew, both around 0 with deviation 0.02, and their biases 0."""
    parts = list(module.named_modules())
    layer = next((n, m) for n, m in parts if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d))
    norm = next((n, m) for n, m in parts if isinstance(m, _BatchNorm))
    for name, part in (layer, norm):
        _draw(part, 0.0, name, randomness, owner, round)


def _draw(part: nn.Module, centre: float, name: str, randomness: Randomness, owner: str, round: int) -> None:
    weight, bias = cast(Tensor | None, part.weight), cast(Tensor | None, part.bias)
    with torch.no_grad():
        if weight is not None:
            first = torch.zeros(1, dtype=torch.int64, device=weight.device)
            drawn = randomness.normal(
                f"weights/{name}", first, tuple(weight.shape), owner=owner, round=round, dtype=weight.dtype
            )
            weight.copy_(centre + SPREAD * drawn[0])
        if bias is not None:
            bias.zero_()
