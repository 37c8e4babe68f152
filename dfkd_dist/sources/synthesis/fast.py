"""Fast (Fang et al. 2022): a few steps from a meta-generator that learns to need no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import FastSpec
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.parallel.player import Player
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.synthesis.generated import Judge, draw_first_layer, fresh_optimizer, images_of, latents
from dfkd_dist.sources.synthesis.meta import Meta
from dfkd_dist.sources.synthesis.moving import MovingStatistics
from dfkd_dist.sources.synthesis.slices import Best, Slice


class Fast:
    """One teacher's meta-generator theta; phi, its copy in each round; and the latents.

    The row shares theta and phi; latents belong to the rank that holds the slice.

    Args:
        spec: its section of the recipe.
        bench: what it works with.
        theta: over the row; one step in a round, at its end.
        phi: a generator like it, over the row; all the round's steps.
        assistant: the network that the adversary plays against in the student's place, or None.
    """

    def __init__(
        self, spec: FastSpec, bench: Bench, theta: Player, phi: Player, assistant: ImageNetwork | None = None
    ) -> None:
        self.spec, self.bench, self.theta, self.phi = spec, bench, theta, phi
        self.judge = Judge(spec, bench, assistant)
        self._statistics = MovingStatistics(bench, spec.bn, spec.bn_momentum)
        self._latents = Slice(bench, f"latents/{bench.name}", spec.lr_latents, spec.betas)
        # What the latents of a round begin from, where they persist.
        self._origin = Slice(bench, f"meta_latents/{bench.name}", spec.meta.lr_latents, spec.betas)
        self._meta, self._meta_latents = Meta(spec.meta), Meta(spec.meta)
        self._best = Best(bench)

    @property
    def players(self) -> Sequence[Player]:
        """Theta and phi."""
        return [self.theta, self.phi]

    @property
    def generator(self) -> Player:
        """What makes the images: phi."""
        return self.phi

    def steps(self, round: int) -> int:
        """Iterations of a round."""
        return self.spec.iterations

    def phase(self, round: int, step: int) -> str:
        """One for all of them."""
        return next(iter(self.spec.phases()))

    # --------------------------------------------------------------------------------------------- a round

    def step(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One iteration on this rank's slice: phi and the latents move together."""
        if step == 0:
            self._begin(round)
        assert self._latents.player is not None
        weights = self.spec.weights_in(round, self.bench.warmup)
        images_NCHW = images_of(self.phi.module, self._latents.values, self.bench)
        seen_NCHW = self.judge.view(images_NCHW, self.spec.view, "global", round, step)
        at = self.judge.ask(seen_NCHW, weights, round, student)
        losses = weighted(self.judge.terms(at) | {"bn": lambda: self._statistics.term(at)}, weights)
        if self.spec.keep == "best":
            self._best.note(self.bench.total(losses), images_NCHW)
        else:
            self._best.forget()
            self._best.note(losses.total.new_zeros(()), images_NCHW)
        # Told in every step, because a state does not hold it.
        self.phi.followers = [self._latents.player]
        yield self.phi, losses
        # By now the trainer has differentiated, and summed over the row.
        self._meta.tell(self.phi)
        if self._origin.active:
            self._meta_latents.tell(self._latents.player)

    def _begin(self, round: int) -> None:
        spec, bench = self.spec, self.bench
        if round == spec.reset_at:
            draw_first_layer(self.theta.module, bench.randomness, bench.name, round)
        begins = latents(bench, self.theta.module, "latents", round)
        if spec.latents == "persistent":
            if spec.redraws(round) or not self._origin.active:
                self._origin.begin(begins)
                fresh_optimizer(self.theta)
            begins = self._origin.values
        self._latents.begin(begins)
        _copy(self.theta, self.phi)
        self._meta.begin()
        self._meta_latents.begin()
        self._best.forget()

    def harvest(self, round: int, student: ImageNetwork) -> tuple[Tensor, Tensor]:
        """The images that are kept. Theta (and latents that persist) learns, and the round's memory is freed."""
        assert self._latents.player is not None
        self._meta.step(self.theta, self.phi)
        if self._origin.player is not None:
            self._meta_latents.step(self._origin.player, self._latents.player)
        self._statistics.end_round()
        images_NCHW = self._best.kept[0]
        self.phi.followers = []
        self._latents.forget()
        self._best.forget()
        return images_NCHW, self.judge.labels(round)

    # ----------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Average statistics and persistent latents; inside a round also all that the round has so far."""
        parts = {
            "latents": self._latents.state_dict(),
            "origin": self._origin.state_dict(),
            "best": self._best.state_dict(),
            "statistics": self._statistics.state_dict(),
            "told": self._told(),
        }
        return {name: part for name, part in parts.items() if part}

    def _told(self) -> dict[str, Tensor]:
        told = {}
        if self._meta.told is not None:
            told["theta"] = self._meta.told.cpu()
        if self._meta_latents.told is not None:
            told["latents"] = self.bench.whole(self._meta_latents.told.view_as(self._latents.values)).cpu()
        return told

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._latents.load_state_dict(state.get("latents", {}))
        self._origin.load_state_dict(state.get("origin", {}))
        self._best.load_state_dict(state.get("best", {}))
        self._statistics.load_state_dict(state.get("statistics", {}))
        told = state.get("told", {})
        self._meta.told = told["theta"].to(self.bench.device) if "theta" in told else None
        self._meta_latents.told = self.bench.mine(told["latents"]).reshape(-1) if "latents" in told else None


def _copy(source: Player, target: Player) -> None:
    """Weights and buffers of one player's module into another's like it, whose optimiser begins afresh."""
    held = source.module.state_dict()
    with torch.no_grad():
        for name, value in target.module.state_dict().items():
            value.copy_(held[name])
    fresh_optimizer(target)
