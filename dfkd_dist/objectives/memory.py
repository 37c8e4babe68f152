"""CRD: each network's embedding of an image is told from other images by the other network's memory of all samples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses import contrastive
from dfkd_dist.models.signals import FEATURES
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.term import Step, Term, ids_and_slots, of_all_ranks
from dfkd_dist.parallel.statistics import sum_own


class Contrast(Term):
    """Contrastive representation distillation (Tian et al. 2020), in both directions, for every teacher.

    The memories are buffers, equal on all ranks: rows of a batch's samples are moved, after the loss, by the
    embeddings of all ranks (a sample is at most once in a batch). Negatives are drawn for each image by its place in
    the global batch, among the samples seen up to the round before (all of them, in the first round), so that samples
    which a selection leaves out are no negatives. The paper, where it has labels, takes them from other classes; here
    there are none, so any other sample is one.

    Z is taken from the first batch and kept, one for each direction, as in the released code. In it the number of
    samples cancels: h = P / (P + K mean(P of the first batch)) for P = exp(s / tau).

    Raises:
        ValueError: the source is no stream, the set has fewer than two samples, or a network has no features.
    """

    memory: Tensor
    log_z: Tensor
    seen: Tensor
    known: Tensor
    round: Tensor

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__(spec, context)
        if context.samples is None or context.samples < 2:
            raise ValueError(f"objective.crd needs a stream of two samples or more, found {context.samples}")
        self.samples, options = context.samples, spec.contrast
        own, others = context.widths(FEATURES, "crd")
        self.student_heads = nn.ModuleList(nn.Linear(own, options.dim) for _ in others)
        self.teacher_heads = nn.ModuleList(nn.Linear(other, options.dim) for other in others)
        bound = math.sqrt(3.0 / options.dim)
        memory = torch.empty(2 * len(others), self.samples, options.dim).uniform_(-bound, bound)
        # For each teacher the student's memory, then the teacher's; a last row of 0 takes what pads the ranks' shares.
        self.register_buffer("memory", F.pad(memory, (0, 0, 0, 1)))
        self.register_buffer("log_z", torch.full((2 * len(others),), math.nan))
        self.register_buffer("seen", torch.zeros(self.samples + 1, dtype=torch.bool))
        self.register_buffer("known", torch.zeros(self.samples + 1, dtype=torch.bool))
        self.register_buffer("round", torch.tensor(-1))
        # What was read from buffers, so as to wait for the device less often.
        self._pooled: tuple[int, Tensor] | None = None
        self._has_z = False
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """The penultimate features."""
        return Needs.both(FEATURES)

    def forward(self, step: Step) -> Tensor:
        """See `Term`; moves the memories."""
        ids_N, slots_N = ids_and_slots(step.batch, "crd")
        rows_NK = torch.cat([ids_N.unsqueeze(1), self._negatives(ids_N, slots_N, step.batch.at)], dim=1)
        embedded = self._embedded(step)
        # An embedding is compared with the other network's memory: the neighbour in the order of both.
        similar = [contrastive.similarities(e, self.memory[i ^ 1], rows_NK) for i, e in enumerate(embedded)]
        self._find_z(similar)
        total_N, tau = step.zeros(), self.spec.contrast.temperature
        for i, similar_NK in enumerate(similar):
            weight = self.context.teacher_weights[i // 2]
            total_N = total_N + weight * contrastive.nce(similar_NK, self.log_z[i], tau, self.samples)
        self._remember(embedded, ids_N, step)
        return step.mean(total_N)

    def _embedded(self, step: Step) -> list[Tensor]:
        """`[N, dim]` of length 1: for each teacher the student's embedding, then the teacher's."""
        own, embedded = step.student.tensor(FEATURES), []
        for k, answer in enumerate(step.answers):
            for head, features_ND in ((self.student_heads[k], own), (self.teacher_heads[k], answer.tensor(FEATURES))):
                assert isinstance(head, nn.Linear)
                embedded.append(contrastive.embedding(head(features_ND.to(head.weight.dtype))))
        return embedded

    # ------------------------------------------------------------------------------------------ negatives

    def _negatives(self, ids_N: Tensor, slots_N: Tensor, at: tuple[int, int]) -> Tensor:
        """`[N, K]`: ids of other samples, drawn with replacement."""
        pool = self._pool(at[0])
        place_N = torch.searchsorted(pool, ids_N).clamp_max(len(pool) - 1)
        drawn_NK = self.context.randomness.integers(
            "crd/negatives", slots_N, len(pool) - 1, (self.spec.contrast.negatives,), round=at[0], step=at[1]
        )
        return pool[drawn_NK + (drawn_NK >= place_N.unsqueeze(1))]  # its own place is left out

    def _pool(self, round: int) -> Tensor:
        """Ids that may be negatives in a round, ascending."""
        if self._pooled is None or self._pooled[0] != round:
            if int(self.round) != round:
                self.known.copy_(self.seen)
                self.round.fill_(round)
            known_M, count = self.known[:-1], int(self.known.sum())
            order_M = (~known_M).to(torch.uint8).argsort(stable=True)
            pool = order_M[:count] if count > 1 else torch.arange(self.samples, device=order_M.device)
            self._pooled = round, pool
        return self._pooled[1]

    def _forget(self) -> None:
        """Other buffers have been loaded."""
        self._pooled, self._has_z = None, False

    # -------------------------------------------------------------------------------------------- memory

    def _find_z(self, similar: list[Tensor]) -> None:
        """Z of every direction from the first batch of all ranks."""
        if not self._has_z and bool(self.log_z.isnan().any()):
            tau = self.spec.contrast.temperature
            own = torch.stack([contrastive.normaliser_parts(s, tau, self.samples) for s in similar])
            parts = sum_own(own, self.context.ranks)
            self.log_z.copy_((parts[:, 0] / parts[:, 1]).log())
        self._has_z = True

    def _remember(self, embedded: list[Tensor], ids_N: Tensor, step: Step) -> None:
        """Move the rows of all ranks' samples."""
        with torch.no_grad():
            # Ids travel with the embeddings, in a type that holds both exactly.
            own = [e.detach().double() for e in embedded] + [ids_N.double().unsqueeze(1)]
            (*parts, ids_M1), valid_M = of_all_ranks(own, step.batch, self.context.ranks)
            ids_M = torch.where(valid_M, ids_M1.squeeze(1).long(), self.samples)
            for memory_SE, part_ME in zip(self.memory, parts, strict=True):
                moved_ME = contrastive.moved(memory_SE[ids_M], part_ME, self.spec.contrast.momentum)
                memory_SE.index_copy_(0, ids_M, torch.where(valid_M.unsqueeze(1), moved_ME, 0.0))
            self.seen.index_copy_(0, ids_M, valid_M)

    def extra_repr(self) -> str:
        """For people."""
        return f"samples={self.samples}"
