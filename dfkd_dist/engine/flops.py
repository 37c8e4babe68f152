"""Size and cost of networks: parameters, and floating-point operations for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfkd_dist.engine.build import Build
from dfkd_dist.models.cards import Card
from dfkd_dist.models.dcgan import AnyGenerator
from dfkd_dist.models.network import ImageNetwork, parameter_count
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.generative import GenerativeSource, Kit
from dfkd_dist.sources.inversion import InversionSource
from dfkd_dist.sources.synthesis.cmi import CMI
from dfkd_dist.sources.synthesis.fast import Fast


@dataclass(frozen=True)
class Cost:
    """What one network weighs.

    Args:
        parameters: how many numbers are learned.
        flops: floating-point operations of one forward pass on one image. A multiply-add counts as two;
            convolutions and matrix products count, elementwise operations do not.
    """

    parameters: int
    flops: int


def cost_of(network: nn.Module, example: Tensor) -> Cost:
    """Run a network on one example (on the meta device nothing is computed)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(example)
    return Cost(parameter_count(network), counter.get_total_flops())


def card_cost(card: Card) -> Cost:
    """Cost of the network that a card describes, without allocating it."""
    with torch.device("meta"):
        return cost_of(card.build().eval(), torch.empty(1, card.channels, card.size, card.size))


def network_costs(build: Build) -> dict[str, Cost]:
    """Every network of the run by name: `teacher/NAME`, `student`, `generator/NAME`, `assistant/NAME`, and so on.

    All ranks call it: a teacher's generator, assistant and discriminator are measured by the ranks that have them.
    Heads of objectives and batch norm folded into convolutions are left out of the account: a teacher is counted as it
    came.
    """
    named = zip(build.recipe.teachers, build.cards, strict=True)
    costs = {f"teacher/{spec.name}": card_cost(card) for spec, card in named}
    costs["student"] = card_cost(build.student_card)
    if isinstance(build.source, GenerativeSource | InversionSource):
        own = _own_costs(build, build.source)
        parts: Sequence[dict[str, Cost]] = build.mesh.column.gather_objects(own)
        costs |= {name: cost for part in parts for name, cost in sorted(part.items())}
    return costs


def _own_costs(build: Build, source: GenerativeSource | InversionSource) -> dict[str, Cost]:
    """Of the networks that this rank trains for its teachers."""
    if isinstance(source, GenerativeSource):
        return {name: cost for kit in source.kits for name, cost in _kit_costs(kit, build).items()}
    makers = [s.generator for s in source.synthesisers if isinstance(s, CMI | Fast)]
    costs = dict(_generator_cost(player) for player in makers)
    pupils = [] if source.assistants is None else source.assistants.pupils
    return costs | {pupil.player.name: _network_cost(pupil.side.network, build) for pupil in pupils}


def _kit_costs(kit: Kit, build: Build) -> dict[str, Cost]:
    costs = dict([_generator_cost(kit.generator)])
    if kit.discriminator is not None:
        with reading_only(kit.discriminator.module, "eval"):
            costs[kit.discriminator.name] = cost_of(kit.discriminator.module, _example(kit.discriminator.module, build))
    if kit.assistant is not None:
        costs[kit.assistant.name] = _network_cost(kit.side.network, build)
    return costs


def _generator_cost(player: Player) -> tuple[str, Cost]:
    generator = cast(AnyGenerator, player.module)
    with reading_only(generator, "eval"):
        latents = next(generator.parameters()).new_zeros(1, *generator.latent_shape)
        return player.name, cost_of(generator, latents)


def _network_cost(network: ImageNetwork, build: Build) -> Cost:
    with reading_only(network, "eval"):
        return cost_of(network.network, network.preprocess(_example(network, build)))


def _example(module: nn.Module, build: Build) -> Tensor:
    image = build.recipe.image
    return next(module.parameters()).new_zeros(1, image.channels, image.size, image.size)
