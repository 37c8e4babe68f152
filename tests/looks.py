"""Collections, networks and a judge for tests of what is looked at: exact, and small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfkd_dist.engine.look.collection import Collection, Seen, chosen
from dfkd_dist.engine.look.networks import FeatureNetwork, Judge

CPU = torch.device("cpu")


class Given(Collection):
    """Images that a test made, as float or uint8 `[N, C, H, W]`."""

    def __init__(
        self,
        images_NCHW: Tensor,
        labels_N: Tensor | None = None,
        classes: Sequence[str] | None = None,
        name: str = "given",
        numbers_N: Tensor | None = None,
    ) -> None:
        super().__init__(name, classes)
        self.images_NCHW, self.labels_N = images_NCHW, labels_N
        self.numbers_N = torch.arange(len(images_NCHW)) if numbers_N is None else numbers_N

    def __len__(self) -> int:
        return len(self.numbers_N)

    def batches(self, batch: int) -> Iterator[Seen]:
        for part in self.numbers_N.split(batch):
            yield Seen(self.images_NCHW[part], None if self.labels_N is None else self.labels_N[part], part)

    def part(self, count: int, seed: int = 0) -> Collection:
        numbers_N = chosen(self.numbers_N, count, seed)
        return Given(self.images_NCHW, self.labels_N, self.classes, self.name, numbers_N)


def of_rows(rows_ND: Tensor, name: str = "given") -> Given:
    """Each row as an image `[D, 1, 1]`."""
    return Given(rows_ND[:, :, None, None], name=name)


def pixels() -> FeatureNetwork:
    """The pixels themselves as features."""
    return FeatureNetwork("pixels", lambda images_NCHW: images_NCHW.flatten(1), CPU, torch.float64)


def by_first_pixel(classes: Sequence[str]) -> Judge:
    """The class is the first pixel times the number of classes, rounded down; the surer the larger the second pixel."""

    def ask(images_NCHW: Tensor) -> Tensor:
        flat = images_NCHW.flatten(1)
        choice = (flat[:, 0] * len(classes)).floor().long().clamp(max=len(classes) - 1)
        confidence = 0.5 + 0.5 * flat[:, 1].clamp(0, 1)
        rest = (1 - confidence) / (len(classes) - 1)
        probs = rest[:, None].expand(-1, len(classes)).clone()
        return probs.scatter(1, choice[:, None], confidence[:, None])

    return Judge("first pixel", list(classes), ask, CPU, torch.float64)
