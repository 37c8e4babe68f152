"""SSKD: distillation on upright and rotated images, and of how a self-supervised head relates them (Xu et al. 2020)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfkd_dist.config import SSKDSpec
from dfkd_dist.losses import distillation
from dfkd_dist.losses import selfsupervised as ss
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.heads import ProjectionHead
from dfkd_dist.models.signals import FEATURES, Batch, Signals
from dfkd_dist.objectives.base import Student
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.term import Step, guesses, of_all_ranks, soft_target
from dfkd_dist.parallel.statistics import share_of

HEAD_TEMPERATURE = 1.0
"""Of the teacher's head's own loss, as in the released code."""


def needs(spec: SSKDSpec) -> Needs:
    """Logits; features where the heads are used."""
    return Needs.both(FEATURES) if spec.ss > 0 else Needs.both()


class SSKD(nn.Module):
    """Four versions of each image (upright, then turned by 90, 180 and 270 degrees) in one pass of the student.

    The teacher's head must know how upright and rotated images belong together before its similarities are worth
    imitating. The paper trains it first, on the frozen teacher's features and the original data, for a quarter of the
    student's epochs. There is no original data here and no loop before the student's, so the head learns from the
    stream itself, in the student's steps, by the same loss; it sees only the teacher's features, which are there
    anyway, so this costs next to nothing. Either it goes on learning throughout (the student then imitates a head that
    gets better), or, nearer to the paper, it learns alone in the first `head_rounds` rounds, while the student has the
    other terms, and is copied and stands still from then on.

    There are no labels, so the paper's cross-entropy is left out, and a transformed image counts as wrong where the
    teachers' guess differs from that for the upright one. Several teachers have a head each, and are averaged.

    Args:
        spec: weights, temperatures and shares.
        context: shapes of features, the teachers' weights, groups.

    Raises:
        ValueError: a network has no features.
    """

    is_settled: Tensor

    def __init__(self, spec: SSKDSpec, context: Context) -> None:
        super().__init__()
        self.spec, self.context, self.views = spec, context, spec.views
        self._needs = needs(spec)
        self.need = self._needs.teacher
        own, others = context.widths(FEATURES, "ss") if spec.ss > 0 else (0, [])
        self.student_head = ProjectionHead(own) if spec.ss > 0 else None
        self.teacher_heads = nn.ModuleList(ProjectionHead(other) for other in others)
        frozen = copy.deepcopy(self.teacher_heads) if spec.head_rounds is not None else nn.ModuleList()
        self.settled_heads = frozen.requires_grad_(False)
        self.register_buffer("is_settled", torch.tensor(False))
        self._settled = False  # the same, but known without waiting for the device
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_settled", False))

    def forward(self, student: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named terms: `kl` a local sum over the global count, the others this rank's share.

        Raises:
            ValueError: the batch holds another number of versions than four.
        """
        if batch.views != self.views:
            raise ValueError(f"the batch holds {batch.views} version(s) of each image, sskd needs {self.views}")
        said = student(batch.images_NCHW, self._needs.student).views(self.views)
        heard = [answer.views(self.views) for answer in answers]
        step = Step(said[0], [versions[0] for versions in heard], batch)
        weights = self._weights(batch.at[0])
        terms = {"kl": lambda: step.mean(self._kl(said[0], step.answers)), "tf": lambda: self._tf(said, heard, batch)}
        if weights["ss"] > 0 or weights["head"] > 0:
            related = self._relate(said, heard, batch, weights)
            terms |= {name: lambda name=name: related[name] for name in related}  # type: ignore[misc]
        return weighted(terms, {name: weight for name, weight in weights.items() if weight > 0})

    def _weights(self, round: int) -> dict[str, float]:
        """Those of this round: first the head learns, then it is imitated, unless both go on together."""
        weights, rounds = self.spec.weights(), self.spec.head_rounds
        if rounds is None:
            return weights
        return weights | ({"ss": 0.0} if round < rounds else {"head": 0.0})

    # ------------------------------------------------------------------------------------- predictions

    def _kl(self, own: Signals, answers: Sequence[Signals]) -> Tensor:
        """`[N]`, times the squared temperature."""
        tau, logits = self.spec.temperature, [answer.logits_NC for answer in answers]
        target_NC = soft_target(logits, self.context.teacher_weights, tau, "mean_probabilities")
        return tau**2 * distillation.kl(target_NC, own.logits_NC, tau)

    def _tf(self, said: Sequence[Signals], heard: Sequence[Sequence[Signals]], batch: Batch) -> Tensor:
        """KL on transformed images: the mean over those of the global batch that are kept."""
        weights = self.context.teacher_weights
        guess_N = guesses([versions[0].logits_NC for versions in heard], weights)
        values, ranks = [], []
        for v in range(1, self.views):
            answers = [versions[v] for versions in heard]
            values.append(self._kl(said[v], answers))
            probs_NC = soft_target([a.logits_NC for a in answers], weights, 1.0, "mean_probabilities")
            ranks.append(ss.rank_of_truth(probs_NC, guess_N))
        own = [torch.stack(values, dim=1), torch.stack(ranks, dim=1).to(values[0].dtype)]
        (values_MV, ranks_MV), valid_M = of_all_ranks(own, batch, self.context.world)
        valid_R = valid_M.repeat_interleave(self.views - 1)
        keep_R = ss.least_wrong(ranks_MV.detach().long().flatten(), self.spec.keep_tf, valid_R)
        return self._share(ss.masked_mean(values_MV.flatten(), keep_R))

    # ---------------------------------------------------------------------------------- self-supervision

    def _relate(
        self, said: Sequence[Signals], heard: Sequence[Sequence[Signals]], batch: Batch, weights: dict[str, float]
    ) -> dict[str, Tensor]:
        """`ss`, or `head`, or both, over the global batch."""
        assert self.student_head is not None
        heads = self._heads(batch.at[0])
        pairs = [(self.student_head, said), *zip(heads, heard, strict=True)]
        own = [torch.cat([head(v.tensor(FEATURES)) for v in versions], dim=1) for head, versions in pairs]
        rows, valid_M = of_all_ranks(own, batch, self.context.world)
        student_RM, *teachers = (ss.similarity(part_MF.unflatten(1, (self.views, -1))) for part_MF in rows)
        found = {"ss": student_RM.new_zeros(()), "head": student_RM.new_zeros(())}
        for weight, teacher_RM in zip(self.context.teacher_weights, teachers, strict=True):
            if weights["ss"] > 0:
                found["ss"] = found["ss"] + weight * self._transfer(student_RM, teacher_RM.detach(), valid_M)
            if weights["head"] > 0:
                head = ss.self_supervision(teacher_RM, HEAD_TEMPERATURE, valid_M)
                found["head"] = found["head"] + weight * head
        return {name: self._share(value) for name, value in found.items()}

    def _transfer(self, student_RM: Tensor, teacher_RM: Tensor, valid_M: Tensor) -> Tensor:
        own_R = ss.own_sample(teacher_RM)
        ranks_R = ss.rank_of_truth(torch.where(valid_M, teacher_RM, -2.0), own_R)
        keep_R = ss.least_wrong(ranks_R, self.spec.keep_ss, valid_M[own_R])
        return ss.transfer(student_RM, teacher_RM, self.spec.ss_temperature, keep_R, valid_M)

    def _heads(self, round: int) -> nn.ModuleList:
        """The teachers' heads as they learn, or, once their rounds are over, as they were then."""
        if self.spec.head_rounds is None or round < self.spec.head_rounds:
            return self.teacher_heads
        if not self._settled and not bool(self.is_settled):
            self.settled_heads.load_state_dict(self.teacher_heads.state_dict())
            self.is_settled.fill_(True)
        self._settled = True
        return self.settled_heads

    def _share(self, value: Tensor) -> Tensor:
        return share_of(value, self.context.world, self.context.ranks.size)
