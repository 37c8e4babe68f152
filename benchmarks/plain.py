"""A plain implementation of one DFMF round, as a careful person would first write it: the baseline of `step.py`.

Eager fp32, NCHW, the batch-norm term with mean and variance in separate passes, teachers run with autograd on and batch
norm unfolded. The same networks, batch sizes, losses and optimisers as ours; nothing is made slow on purpose.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.config import GenerativeSpec, Recipe
from dfkd_dist.models.generator import Generator
from dfkd_dist.models.registry import build_network


class PlainVID(nn.Module):
    """Three 1x1 convolutions and one variance per channel."""

    def __init__(self, own: int, other: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(a, other, 1, bias=False) for a in (own, other, other)]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.rho = nn.Parameter(torch.full((other,), 5.0))

    def forward(self, own: Tensor, target: Tensor) -> Tensor:
        variance = (F.softplus(self.rho) + 1e-5).view(1, -1, 1, 1)
        return 0.5 * (variance.log() + (target - self.mean(own)) ** 2 / variance).mean()


class PlainDFMF:
    """Teachers, generators, assistants and a student, and one round of Algorithm 1 over them."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.source, GenerativeSpec) and recipe.source.assistant is not None
        torch.manual_seed(0)
        self.recipe, self.source, self.assistant_spec = recipe, recipe.source, recipe.source.assistant
        archs = [spec.arch or "" for spec in recipe.teachers]
        self.teachers = [self._net(arch).eval() for arch in archs]
        self.assistants = [self._net(arch) for arch in archs]
        self.student = self._net(recipe.student.arch)
        g, image = self.source.generator, recipe.image
        self.generators = [
            Generator(g.latent, g.width, g.blocks, image.size, image.channels, g.head) for _ in recipe.teachers
        ]
        self.maps: dict[nn.Module, Tensor] = {}
        self.bn_inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
        for network in [*self.teachers, *self.assistants, self.student]:
            self._listen(network)
        widths = [self._map_width(t) for t in self.teachers]
        own = self._map_width(self.student)
        self.student_vid = nn.ModuleList(PlainVID(own, w) for w in widths)
        self.assistant_vid = [PlainVID(w, w) for w in widths]
        self.g_opts = [torch.optim.Adam(g.parameters(), 1e-3, (0.5, 0.999)) for g in self.generators]
        self.a_opts = [
            self._sgd([*a.parameters(), *v.parameters()])
            for a, v in zip(self.assistants, self.assistant_vid, strict=True)
        ]
        self.s_opt = self._sgd([*self.student.parameters(), *self.student_vid.parameters()])
        self.seconds: dict[str, float] = defaultdict(float)

    def _net(self, arch: str) -> nn.Module:
        return build_network(arch, num_classes=self.recipe.num_classes, in_channels=self.recipe.image.channels)

    def _sgd(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True)

    def _listen(self, network: nn.Module) -> None:
        """Keep batch-norm inputs and the output of the last module with a map."""
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda m, args: self.bn_inputs.append((m, args[0])))
            module.register_forward_hook(lambda _, __, out: self._note_map(network, out))

    def _note_map(self, network: nn.Module, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim() == 4:
            self.maps[network] = out

    def _map_width(self, network: nn.Module) -> int:
        image = self.recipe.image
        network(torch.zeros(2, image.channels, image.size, image.size))
        self.bn_inputs.clear()
        return self.maps[network].shape[1]

    def _latents(self, count: int) -> Tensor:
        return torch.randn(count, self.source.generator.latent)

    def round(self) -> None:
        """One main round: generators, M_GA assistant steps, M_S student steps."""
        self._timed("generator", self._generators)
        for _ in range(self.assistant_spec.steps):
            self._timed("assistant", self._assistants)
        for _ in range(self.recipe.rounds.student_steps):
            images = self._timed("exchange", self._student_images)
            self._timed("student", lambda images=images: self._student(*images))

    def _timed(self, phase: str, act: Any) -> Any:
        start = time.perf_counter()
        out = act()
        self.seconds[phase] += time.perf_counter() - start
        return out

    def _generators(self) -> None:
        tau, loss_spec = self.source.adversary.temperature, self.source.loss
        for teacher, assistant, generator, opt in zip(
            self.teachers, self.assistants, self.generators, self.g_opts, strict=True
        ):
            images = generator(self._latents(self.recipe.batch))
            self.bn_inputs.clear()
            logits = teacher(images)
            bn = torch.zeros(())
            for norm, x in self.bn_inputs:
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
                stored_mean, stored_var = norm.running_mean, norm.running_var
                assert stored_mean is not None and stored_var is not None
                bn = (
                    bn
                    + (
                        ((mean - stored_mean) ** 2 + var) / (2 * stored_var) - 0.5 * (var / stored_var).log() - 0.5
                    ).mean()
                )
            p = logits.softmax(1)
            ice = -(p * logits.log_softmax(1)).sum(1).mean()
            mean_p = p.mean(0)
            bce = (mean_p * mean_p.log()).sum()
            other = assistant.eval()(images)
            adv = -F.kl_div((other / tau).log_softmax(1), (logits / tau).softmax(1), reduction="batchmean")
            loss = loss_spec.bn * bn + loss_spec.ice * ice + loss_spec.bce * bce + loss_spec.adv * adv
            opt.zero_grad()
            loss.backward()
            opt.step()
            assistant.train()

    def _assistants(self) -> None:
        tau = self.assistant_spec.objective.temperature
        parts = (self.teachers, self.assistants, self.assistant_vid, self.generators, self.a_opts)
        for teacher, assistant, vid, generator, opt in zip(*parts, strict=True):
            images = generator(self._latents(self.recipe.batch)).detach()
            answer = teacher(images).detach()
            target_map = self.maps[teacher].detach()
            logits = assistant(images)
            kl = F.kl_div((logits / tau).log_softmax(1), (answer / tau).softmax(1), reduction="batchmean")
            loss = kl + vid(self.maps[assistant], target_map)
            opt.zero_grad()
            loss.backward()
            opt.step()
        self.bn_inputs.clear()

    def _student_images(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        each = self.recipe.batch // len(self.teachers)
        images = torch.cat([generator(self._latents(each)).detach() for generator in self.generators])
        answers, maps = [], []
        for teacher in self.teachers:
            answers.append(teacher(images).detach())
            maps.append(self.maps[teacher].detach())
        return images, answers, maps

    def _student(self, images: Tensor, answers: list[Tensor], maps: list[Tensor]) -> None:
        tau = self.recipe.objective.temperature
        target = torch.stack([(a / tau).softmax(1) for a in answers]).mean(0)
        logits = self.student(images)
        loss = F.kl_div((logits / tau).log_softmax(1), target, reduction="batchmean")
        for vid, target_map in zip(self.student_vid, maps, strict=True):
            assert isinstance(vid, PlainVID)
            loss = loss + vid(self.maps[self.student], target_map) / len(maps)
        self.s_opt.zero_grad()
        loss.backward()
        self.s_opt.step()
        self.bn_inputs.clear()
