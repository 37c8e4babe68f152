"""CMI (Fang et al. 2021): a generator for every round, whose images should differ from those of all rounds before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.config import CMISpec
from dfkd_dist.losses import contrastive_inversion
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import MEANS, NAMED_MEANS, Need
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.topology import bounds
from dfkd_dist.sources.synthesis.bank import Bank
from dfkd_dist.sources.synthesis.base import Bench
from dfkd_dist.sources.synthesis.generated import Judge, draw_weights, fresh_optimizer, images_of, latents
from dfkd_dist.sources.synthesis.slices import Best, Slice
from dfkd_dist.sources.terms import GeneratorStep


class CMI:
    """Generator and latents of one teacher's images, drawn anew in every round and optimised together.

    The row shares the generator, the head and the bank; latents belong to the rank that holds the slice.

    Args:
        spec: its section of the recipe.
        bench: what it works with.
        generator: over the row.
        head: what embeds the features, over the row; None without the term `cr`.
        assistant: the network that the adversary plays against in the student's place, or None.
    """

    def __init__(
        self, spec: CMISpec, bench: Bench, generator: Player, head: Player | None, assistant: ImageNetwork | None = None
    ) -> None:
        self.spec, self.bench, self.generator, self.head = spec, bench, generator, head
        self.judge = Judge(spec, bench, assistant)
        self._latents = Slice(bench, f"latents/{bench.name}", spec.lr, spec.betas)
        self._best = Best(bench)
        self._bank = Bank(bench, spec.contrast.bank)

    @property
    def players(self) -> Sequence[Player]:
        """Generator and head."""
        return [player for player in (self.generator, self.head) if player is not None]

    def steps(self, round: int) -> int:
        """Iterations of a round."""
        return self.spec.iterations

    def phase(self, round: int, step: int) -> str:
        """One for all of them."""
        return next(iter(self.spec.phases()))

    # --------------------------------------------------------------------------------------------- a round

    def step(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One iteration on this rank's slice: the generator, the latents and the head move together."""
        if step == 0:
            self._begin(round)
        assert self._latents.player is not None
        weights = self.spec.weights_in(round, self.bench.warmup)
        contrasts = weights["cr"] > 0 and self.head is not None
        images_NCHW = images_of(self.generator.module, self._latents.values, self.bench)
        seen_NCHW = self.judge.view(images_NCHW, self.spec.global_view, "global", round, step)
        at = self.judge.ask(seen_NCHW, weights, round, student, features_need(self.spec) if contrasts else frozenset())
        kept = [images_NCHW, *([self._features(at, images_NCHW, round, step)] if contrasts else [])]
        terms = self.judge.terms(at) | {"cr": lambda: self._contrast(at, kept[1], round, step)}
        losses = weighted(terms, weights)
        self._keep(losses, kept)
        # Told in every step, because a state does not hold it.
        self.generator.followers = [self._latents.player, *([self.head] if contrasts and self.head else [])]
        yield self.generator, losses

    def _begin(self, round: int) -> None:
        """A new generator, new latents and no moments; head and bank stay."""
        draw_weights(self.generator.module, self.bench.randomness, self.bench.name, round)
        fresh_optimizer(self.generator)
        self._latents.begin(latents(self.bench, self.generator.module, "latents", round))
        self._best.forget()

    def _keep(self, losses: Losses, kept: Sequence[Tensor]) -> None:
        if self.spec.keep == "best":
            self._best.note(self.bench.total(losses), *kept)
        else:
            self._best.forget()
            self._best.note(losses.total.new_zeros(()), *kept)

    def harvest(self, round: int, student: ImageNetwork) -> tuple[Tensor, Tensor]:
        """The images that are kept; their features go to the bank, and the round's memory is freed."""
        images_NCHW, *features = self._best.kept
        if features:
            self._bank.add(self.bench.whole(features[0]))
        self.generator.followers = []
        self._latents.forget()
        self._best.forget()
        return images_NCHW, self.judge.labels(round)

    # ----------------------------------------------------------------------------------------- the contrast

    def _features(self, at: GeneratorStep, images_NCHW: Tensor, round: int, step: int) -> Tensor:
        """`[n, 2 D]`: channel means of this rank's local and global views; gradient reaches the images."""
        local_NCHW = self.judge.view(images_NCHW, self.spec.local_view, "local", round, step)
        local_ND, global_ND = self.bench.teacher(local_NCHW, features_need(self.spec)).means_ND, at.teacher.means_ND
        assert local_ND is not None and global_ND is not None
        return torch.cat([local_ND, global_ND], dim=1)

    def _contrast(self, at: GeneratorStep, features_NF: Tensor, round: int, step: int) -> Tensor:
        """This rank's part of the mean over the batch, plus that of the mean over what is drawn from the bank.

        Local views are embedded by the rank that has them, remembered ones by the rank to whose slice they fall, so
        that each row's gradient reaches the head once. The global views of all come together without gradient.
        """
        spec, sync, own = self.spec.contrast, at.sync, len(features_NF)
        remembered = self._bank.count(spec.negatives)
        low, high = bounds(remembered, sync.size, sync.rank)
        rows_NF = features_NF
        if remembered:
            numbers = self._bank.sample(spec.negatives, round, step)[low:high]
            rows_NF = torch.cat([features_NF, self._bank.rows(numbers)])
        local_ND, global_ND = rows_NF.chunk(2, dim=1)
        local_NE = self._embedded(local_ND)
        with torch.no_grad():
            global_NE = self._embedded(global_ND)
        batch_ME, first = _whole(global_NE[:own], at.count, sync)
        bank_ME, other = _whole(global_NE[own:], remembered, sync)
        places = torch.arange(len(rows_NF), device=rows_NF.device)
        own_N = torch.where(places < own, places + first, places - own + other + len(batch_ME))
        values_N = contrastive_inversion.own_among_all(
            local_NE, torch.cat([batch_ME, bank_ME]), own_N, spec.temperature
        )
        term = at.mean(values_N[:own])
        if not remembered:
            return term
        copies = at.replicas // sync.size  # of the term, where ranks stand alone
        return term + values_N[own:].sum() / (remembered * copies)

    def _embedded(self, features_ND: Tensor) -> Tensor:
        assert self.head is not None
        with self.bench.autocast():
            embedded_NE: Tensor = self.head.module(features_ND.to(self.bench.dtype))
        return embedded_NE.to(self.bench.dtype)

    # ----------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The bank; inside a round latents, their moments and the best images so far too."""
        parts = {
            "latents": self._latents.state_dict(),
            "best": self._best.state_dict(),
            "bank": self._bank.state_dict(),
        }
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._latents.load_state_dict(state.get("latents", {}))
        self._best.load_state_dict(state.get("best", {}))
        self._bank.load_state_dict(state.get("bank", {}))


def features_need(spec: CMISpec) -> Need:
    """What the teacher is asked for to contrast images."""
    layers = spec.contrast.layers
    return frozenset({MEANS} if layers is None else {NAMED_MEANS + name for name in layers})


def _whole(part_NE: Tensor, total: int, group: Group) -> tuple[Tensor, int]:
    """The members' slices of `total` rows in order, without gradient, and where this member's begin.

    A member that stands alone has its own slice only.
    """
    if group.size == 1:
        return part_NE, 0
    spans = [bounds(total, group.size, r) for r in range(group.size)]
    longest = max(high - low for low, high in spans)
    padded = torch.cat([part_NE, part_NE.new_zeros(longest - len(part_NE), part_NE.shape[1])])
    parts = group.gather(padded)
    whole = torch.cat([part[: high - low] for part, (low, high) in zip(parts, spans, strict=True)])
    return whole, spans[group.rank][0]
