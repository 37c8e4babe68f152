"""Small real networks, batches and objectives for tests of what a student minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dfkd_dist.config import AnyObjectiveSpec
from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.signals import FEATURES, LOGITS, MAP, Batch, Need, Signals
from dfkd_dist.objectives.registry import Context, make_objective, needs
from dfkd_dist.parallel.group import ALONE, Group
from dfkd_dist.parallel.randomness import Randomness
from tests.recipes import CLASSES, stir

SIZE, SAMPLES = 8, 40


def section(**given: Any) -> Any:
    """The section of a recipe; plain distillation where no kind is given."""
    return TypeAdapter(AnyObjectiveSpec).validate_python(given)


def network(arch: str, seed: int) -> ImageNetwork:
    """In double precision, with batch norms as after training."""
    torch.manual_seed(seed)
    inner = stir(build_network(arch, num_classes=CLASSES, in_channels=3), seed)
    return ImageNetwork(inner, Preprocess(SIZE, 3, [0.5] * 3, [0.25] * 3), arch).double()


class Class:
    """A student, its teachers and an objective, on some ranks.

    Args:
        spec: the objective's section.
        archs: of the student, then of the teachers.
        world: the ranks that share a batch.
        replicas: the ranks that hold the student.
    """

    def __init__(
        self, spec: Any, archs: Sequence[str] = ("tiny", "wrn16_1"), world: Group = ALONE, replicas: Group = ALONE
    ) -> None:
        wanted = needs(spec)
        self.student = network(archs[0], 1)
        self.teachers = [network(arch, 2 + k).eval().requires_grad_(False) for k, arch in enumerate(archs[1:])]
        weights = [2.0 * (k + 1) / (len(self.teachers) * (len(self.teachers) + 1)) for k in range(len(self.teachers))]
        own = self.student.shapes(SIZE, 3, wanted.student | {LOGITS, FEATURES, MAP})
        others = [t.shapes(SIZE, 3, wanted.teacher | {LOGITS, FEATURES, MAP}) for t in self.teachers]
        torch.manual_seed(0)
        context = Context(weights, own, others, CLASSES, SAMPLES, world, Randomness(7), replicas)
        made = make_objective(spec, context)
        assert isinstance(made, nn.Module)
        self.objective: Any = made.double()
        self.weights = weights

    def answers(self, images_NCHW: Tensor) -> list[Signals]:
        """What the teachers say."""
        return [teacher(images_NCHW, self.objective.need) for teacher in self.teachers]

    def losses(self, batch: Batch) -> Losses:
        """One step's, without batch statistics, so that an image's answer does not depend on its neighbours."""
        return self.objective(self.student.eval(), self.answers(batch.images_NCHW), batch)

    def gradients(self, losses: Losses) -> dict[str, Tensor]:
        """By name: of the student and of the objective; zeros where there is none."""
        modules = {"student": self.student, "objective": self.objective}
        named = {
            f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad
        }
        found = torch.autograd.grad(losses.total, list(named.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def images(count: int, seed: int = 0) -> Tensor:
    """In double precision."""
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count: int, low: int = 0, high: int | None = None, at: tuple[int, int] = (0, 0), views: int = 1) -> Batch:
    """Slots `low` to `high` of a global batch of `count` images, as a stream gives them; new images at each step."""
    high = count if high is None else high
    own = images(count, seed=1 + at[0] * 100 + at[1])[low:high]
    turned = torch.cat([own.rot90(v, (2, 3)) for v in range(views)])
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(at[0] * 100 + at[1]))
    labels = torch.arange(low, high) % CLASSES
    slots = torch.arange(low, high)
    return Batch(turned, count, labels_N=labels, ids_N=order[low:high], slots_N=slots, at=at, views=views)


def said(module: ImageNetwork, images_NCHW: Tensor, need: Need) -> Signals:
    """A network's answer in eval mode."""
    return module.eval()(images_NCHW, need)
