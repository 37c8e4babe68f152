"""DFND: distillation from teachers that are often wrong on images of another domain (Chen et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfkd_dist.config import NoisySpec
from dfkd_dist.losses import distillation, noisy
from dfkd_dist.losses.weighted import Losses, weighted
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.objectives.base import Student
from dfkd_dist.objectives.context import Context, Needs
from dfkd_dist.objectives.term import Step, guesses, soft_target


def needs(spec: NoisySpec) -> Needs:
    """The logits alone."""
    return Needs.both()


class Noisy(nn.Module):
    """KL to the teachers, and cross-entropy with their guess through the noise matrix Q.

    Several teachers count as one that answers with the weighted mean of their probabilities. Q starts with equal
    off-diagonals. The released code trains its logits with Adam (1e-3, no decay) beside the student's SGD; here they
    belong to the student's optimiser, at `noise_rate` times its learning rate.

    Args:
        spec: weights, temperature, accuracy.
        context: number of classes, the teachers' weights.
    """

    views = 1

    def __init__(self, spec: NoisySpec, context: Context) -> None:
        super().__init__()
        self.spec, self.teacher_weights = spec, list(context.teacher_weights)
        self.need = needs(spec).teacher
        self.noise = nn.Parameter(torch.zeros(context.num_classes, context.num_classes - 1))

    def forward(self, student: Student, answers: Sequence[Signals], batch: Batch) -> Losses:
        """Named terms: each the local sum over the global count."""
        step = Step(student(batch.images_NCHW, needs(self.spec).student), answers, batch)
        own_NC, logits = step.student.logits_NC, [answer.logits_NC for answer in answers]
        return weighted(
            {
                "kl": lambda: step.mean(self._kl(own_NC, logits)),
                "noisy": lambda: step.mean(self._noisy(own_NC, logits)),
            },
            self.spec.weights(),
        )

    def _kl(self, own_NC: Tensor, logits: Sequence[Tensor]) -> Tensor:
        tau = self.spec.temperature
        target_NC = soft_target(logits, self.teacher_weights, tau, "mean_probabilities")
        scale = tau**2 if self.spec.kl_scale == "tau2" else 1.0
        return scale * distillation.kl(target_NC, own_NC, tau)

    def _noisy(self, own_NC: Tensor, logits: Sequence[Tensor]) -> Tensor:
        # A step on the parameter moves the logits by the factor squared.
        noise_CB = math.sqrt(self.spec.noise_rate) * self.noise
        transition_CC = noisy.log_transition(noise_CB, self.spec.accuracy)
        return noisy.noisy_cross_entropy(own_NC, guesses(logits, self.teacher_weights), transition_CC)
