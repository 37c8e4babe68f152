"""Terms that compare the networks image by image."""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_dist.config import ObjectiveSpec
from dfkd_dist.losses import distillation, hint, vid
from dfkd_dist.models.heads import MapRegressor, VIDHead
from dfkd_dist.models.signals import LOGITS, MAP, NAMED_MAP
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.term import Step, Term, labels, soft_target
from dfkd_dist.parallel.batchnorm import synchronise


class KL(Term):
    """KL between the teachers' tempered target and the student (DFMF, Eqs. 1 and 2)."""

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        spec, logits = self.spec, [answer.logits_NC for answer in step.answers]
        target_NC = soft_target(logits, self.context.teacher_weights, spec.temperature, spec.target)
        compare = distillation.kl if spec.kl_direction == "forward" else distillation.reverse_kl
        scale = spec.temperature**2 if spec.kl_scale == "tau2" else 1.0
        return step.mean(scale * compare(target_NC, step.student.logits_NC, spec.temperature))


class L1(Term):
    """Mean absolute difference to the teachers' mean logits (DFAD)."""

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        logits_NC = distillation.mean_logits([a.logits_NC for a in step.answers], self.context.teacher_weights)
        return step.mean(distillation.l1(logits_NC, step.student.logits_NC))


class CrossEntropy(Term):
    """Cross-entropy with labels."""

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        return step.mean(distillation.cross_entropy(step.student.logits_NC, labels(step.batch)))


class Attention(Term):
    """Attention maps of the last convolution (ZSKT's choice of Zagoruyko and Komodakis 2017)."""

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """The maps."""
        return Needs.both(MAP)

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        total_N, own = step.zeros(), step.student.tensor(MAP)
        for weight, answer in zip(self.context.teacher_weights, step.answers, strict=True):
            total_N = total_N + weight * distillation.attention_transfer(own, answer.tensor(MAP))
        return step.mean(total_N)


class VID(Term):
    """Likelihood of each teacher's last map under a Gaussian that a head predicts from the student's (DFMF, Eq. 2)."""

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__(spec, context)
        own, others = context.widths(MAP, "vid")
        self.heads = nn.ModuleList(VIDHead(own, other, vid.initial_rho()) for other in others)

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """The maps."""
        return Needs.both(MAP)

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        total_N = step.zeros()
        for weight, head, answer in zip(self.context.teacher_weights, self.heads, step.answers, strict=True):
            assert isinstance(head, VIDHead)
            own, target = vid.match_spatial(step.student.tensor(MAP), answer.tensor(MAP))
            total_N = total_N + weight * vid.vid(head(own), target, vid.variance(head.rho))
        return step.mean(total_N)


class Hint(Term):
    """Squared error between each teacher's map and the student's, through a regressor (FitNets, Eq. 3).

    The paper trains the lower half of the student by this alone, and then the whole by distillation. Here, as in the
    field's comparisons, it is a term beside the others.
    """

    def __init__(self, spec: ObjectiveSpec, context: Context) -> None:
        super().__init__(spec, context)
        self.own, self.other = _map(spec.fitnet.student), _map(spec.fitnet.teacher)
        own = context.shape(self.own, "hint")
        others = [context.shape(self.other, "hint", k) for k in range(len(context.teacher_shapes))]
        options = spec.fitnet.activation, spec.fitnet.normalise
        self.heads = nn.ModuleList(MapRegressor(own, other, *options) for other in others)
        synchronise(self.heads, context.world)

    @staticmethod
    def needs(spec: ObjectiveSpec) -> Needs:
        """The maps of the layers named."""
        teacher, student = _map(spec.fitnet.teacher), _map(spec.fitnet.student)
        return Needs(frozenset({LOGITS, teacher}), frozenset({LOGITS, student}))

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        total_N, own = step.zeros(), step.student.tensor(self.own)
        for weight, head, answer in zip(self.context.teacher_weights, self.heads, step.answers, strict=True):
            total_N = total_N + weight * hint.hint(head(own), answer.tensor(self.other))
        return step.mean(total_N)


def _map(layer: str) -> str:
    """The signal of a layer."""
    return MAP if layer == MAP else NAMED_MAP + layer
