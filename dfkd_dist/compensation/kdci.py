"""KDCI: knowledge distillation with bias compensation (section 3.3, Eqs. 3-5; Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_dist.compensation.dictionary import Dictionary, Features, cluster, cluster_pieces
from dfkd_dist.config import KDCISpec
from dfkd_dist.losses.distillation import mean_logits
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.randomness import Randomness


class KDCI(nn.Module):
    """phi(f_S(x), F(z)) = f_S(x) + F, with F(x) = sum_i lambda_i(x) z_i P(z_i).

    lambda(x) = softmax_i(W_t tanh(W_q s(x) + W_k z_i)): W_q takes the student's logits, as their sizes demand. Until
    the first dictionary is built, F is zero.

    Args:
        spec: sizes and the ablations of Tables 4 and 5.
        num_classes: C of the student's logits.
        width: d of the features (C, where the teachers themselves give them).
        teacher_weights: w_k; several teachers' features are their weighted mean logits.
        world: the ranks that share a batch; one of them clusters, all get the same.
        randomness: of the ablations, and K-Means++'s seed.
        look: another network's logits on images, for Table 5; None takes the teachers' answers.
        selected: a pass over the features of all selected real images on rank 0 (nothing elsewhere) and their number,
            where they are clustered once; None clusters a fresh batch in every round.
    """

    prototypes_Nd: Tensor
    proportions_N: Tensor
    random_N: Tensor
    built: Tensor

    def __init__(
        self,
        spec: KDCISpec,
        num_classes: int,
        width: int,
        teacher_weights: Sequence[float],
        world: Group,
        randomness: Randomness,
        look: Callable[[Tensor], Tensor] | None = None,
        selected: Callable[[], tuple[Callable[[], Iterator[Features]], int]] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.teacher_weights = spec, list(teacher_weights)
        self.world, self.randomness, self._look, self._selected = world, randomness, look, selected
        if spec.attention == "learned":
            self.query = nn.Linear(num_classes, spec.hidden, bias=False)
            self.key = nn.Linear(width, spec.hidden, bias=False)
            self.score = nn.Linear(spec.hidden, 1, bias=False)
        self.mapping = None if width == num_classes else nn.Linear(width, num_classes, bias=False)
        self.register_buffer("prototypes_Nd", torch.zeros(spec.size, width))
        self.register_buffer("proportions_N", torch.zeros(spec.size))
        self.register_buffer("random_N", torch.zeros(spec.size))
        self.register_buffer("built", torch.zeros((), dtype=torch.bool))

    # ----------------------------------------------------------------------------------------- compensation

    def forward(self, logits_NC: Tensor) -> Tensor:
        """Compensated logits `[N, C]`."""
        return logits_NC + self.correction(logits_NC)

    def correction(self, logits_NC: Tensor) -> Tensor:
        """F(x) `[N, C]` (Eq. 4)."""
        weights_NM = self.weights(logits_NC)
        correction_Nd = (weights_NM * self.proportions_N) @ self.prototypes_Nd
        return correction_Nd if self.mapping is None else self.mapping(correction_Nd)

    def weights(self, logits_NC: Tensor) -> Tensor:
        """lambda(x) `[N, prototypes]` (Eq. 5)."""
        if self.spec.attention == "random":
            return self.random_N.expand(len(logits_NC), -1)
        asked_NC = logits_NC.detach() if self.spec.detach else logits_NC
        mixed_NMH = torch.tanh(self.query(asked_NC)[:, None] + self.key(self.prototypes_Nd))
        return self.score(mixed_NMH).squeeze(-1).softmax(dim=1)

    # ------------------------------------------------------------------------------------------- dictionary

    def update(self, round: int, batch: Batch, answers: Sequence[Signals]) -> None:
        """A new dictionary, where one is due: the same on every rank."""
        once = self._selected is not None
        if bool(self.built) and (once or round % self.spec.every):
            return
        found = self._of_all_selected() if once else self._of_batch(round, batch, answers)
        prototypes_Nd, counts_N = self._shared(found)
        if self.spec.prototypes == "random":
            prototypes_Nd = self._like(prototypes_Nd, counts_N, round)
        self.prototypes_Nd.copy_(prototypes_Nd)
        self.proportions_N.copy_(self._proportions(counts_N))
        self.random_N.copy_(self._random_weights(round))
        self.built.fill_(True)

    def _of_batch(self, round: int, batch: Batch, answers: Sequence[Signals]) -> Dictionary | None:
        """Clusters of the global batch, in the order of its slots; on rank 0."""
        features_nd = self._features(batch, answers)
        slots_n = batch.slots_N if batch.slots_N is not None else torch.arange(len(features_nd))
        parts = self.world.gather_objects((slots_n.cpu().numpy(), features_nd.double().cpu().numpy()))
        if self.world.rank != 0:
            return None
        order = np.concatenate([slots for slots, _ in parts]).argsort(kind="stable")
        features_Md = np.concatenate([features for _, features in parts])[order]
        return cluster(features_Md, self.spec.size, self.spec.pca, self._seed(round))

    def _features(self, batch: Batch, answers: Sequence[Signals]) -> Tensor:
        with torch.no_grad():
            if self._look is not None:
                return self._look(batch.images_NCHW)
            said = [answer.views(batch.views)[0].logits_NC for answer in answers]
            return mean_logits(said, self.teacher_weights)

    def _of_all_selected(self) -> Dictionary | None:
        assert self._selected is not None
        pieces, samples = self._selected()
        if self.world.rank != 0:
            return None
        return cluster_pieces(pieces, samples, self.spec.size, self.spec.pca, self._seed(0))

    def _shared(self, found: Dictionary | None) -> tuple[Tensor, Tensor]:
        """Rank 0's dictionary as float64, on all ranks."""
        told = None if found is None else (found.prototypes_Nd, found.counts_N)
        first = self.world.gather_objects(told)[0]
        assert first is not None
        return torch.from_numpy(first[0]), torch.from_numpy(first[1])

    def _proportions(self, counts_N: Tensor) -> Tensor:
        match self.spec.proportions:
            case "counts":
                return counts_N.double() / counts_N.sum()
            case "uniform":
                return torch.full((len(counts_N),), 1.0 / len(counts_N))
            case "one":
                return torch.ones(len(counts_N))

    def _like(self, prototypes_Nd: Tensor, counts_N: Tensor, round: int) -> Tensor:
        """Normal numbers with the weighted mean and variance of the clusters' means, per dimension."""
        weight_N1 = (counts_N.double() / counts_N.sum())[:, None]
        mean_d = (weight_N1 * prototypes_Nd).sum(dim=0)
        std_d = (weight_N1 * (prototypes_Nd - mean_d) ** 2).sum(dim=0).sqrt()
        rows, width = prototypes_Nd.shape
        drawn = self.randomness.normal(
            "kdci/prototypes", torch.arange(rows), (width,), round=round, dtype=torch.float64
        )
        return mean_d + std_d * drawn

    def _random_weights(self, round: int) -> Tensor:
        drawn = self.randomness.uniform("kdci/weights", torch.arange(self.spec.size), round=round, dtype=torch.float64)
        return drawn / drawn.sum()

    def _seed(self, round: int) -> int:
        """For scikit-learn, which takes 32 bits."""
        return int(self.randomness.integers("kdci/seed", torch.zeros(1, dtype=torch.int64), 2**31, round=round))
