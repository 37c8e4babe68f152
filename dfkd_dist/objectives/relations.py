"""RKD: the student keeps the distances and angles between the images of the global batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses import relational
from dfkd_dist.models.signals import FEATURES
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.term import Step, Term, of_all_ranks
from dfkd_dist.parallel.statistics import share_of


class _Relation(Term):
    """A relation between penultimate features, computed alike on every rank from those of all."""

    name = ""
    compare: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__(spec, context)
        context.widths(FEATURES, self.name)

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """The penultimate features."""
        return Needs.both(FEATURES)

    def forward(self, step: Step) -> Tensor:
        """See `Term`; the teachers' terms are averaged by their weights."""
        own = [step.student.tensor(FEATURES), *(answer.tensor(FEATURES) for answer in step.answers)]
        (student_MD, *teachers), valid_M = of_all_ranks(own, step.batch, self.context.world)
        total = student_MD.new_zeros(())
        for weight, teacher_MD in zip(self.context.teacher_weights, teachers, strict=True):
            total = total + weight * type(self).compare(student_MD, teacher_MD, valid_M)
        return share_of(total, self.context.world, self.context.ranks.size)


class Distances(_Relation):
    """RKD-D (Park et al. 2019)."""

    name = "rkd_d"
    compare = staticmethod(relational.distance)


class Angles(_Relation):
    """RKD-A (Park et al. 2019)."""

    name = "rkd_a"
    compare = staticmethod(relational.angle)
