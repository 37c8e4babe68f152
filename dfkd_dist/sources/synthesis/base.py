"""What the inversion source asks of a synthesis, and what every synthesis is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dfkd_dist.losses.weighted import Losses
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topology import bounds

Autocast = Callable[[], AbstractContextManager[Any]]


class Synthesiser(Protocol):
    """Makes `Bench.batch` images a round for one teacher, over the row of ranks that hold this teacher.

    Pixels and latents belong to the rank that holds the slice; trained modules are shared by the row.
    """

    bench: Bench

    @property
    def players(self) -> Sequence[Player]:
        """Trained modules that the row shares (generators, heads), saved by name; their group is the row."""
        ...

    def steps(self, round: int) -> int:
        """Iterations of a round; the same number on every rank of the world."""
        ...

    def phase(self, round: int, step: int) -> str:
        """What iteration `step` is called in timings: one of the spec's `phases()`."""
        ...

    def step(self, round: int, step: int, student: ImageNetwork, observe: bool) -> Iterator[tuple[Player, Losses]]:
        """One iteration: what each player minimises; the trainer differentiates, then all players step at once.

        Iteration 0 begins the round. `student` is only to be read. What must follow a player's step (clamping) is done
        at the beginning of the next call. With `observe` also fill `Losses.report`.
        """
        ...

    def harvest(self, round: int, student: ImageNetwork) -> tuple[Tensor, Tensor]:
        """This rank's slice of the round's images: image space, `[n, C, H, W]` (to be clamped), and their labels."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive inside a round or between rounds besides the players; empty where there is nothing.

        Whole over the row in index order (`Bench.whole`), so that any number of ranks can go on. All ranks of the row
        ask at once.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, taking this rank's slice (`Bench.mine`)."""
        ...


@dataclass(frozen=True)
class Bench:
    """What a synthesis works with.

    Args:
        teacher: with batch norm as it came; gradient reaches the images.
        mesh: groups.
        randomness: counter-based; give `owner=teacher.name`.
        batch: images of a round over the row.
        channels: of images.
        size: of images.
        num_classes: C.
        warmup: rounds in which the student does not learn.
        dtype: of images and latents.
        device: where they live.
        autocast: the number format of trained networks.
    """

    teacher: Teacher
    mesh: Mesh
    randomness: Randomness
    batch: int
    channels: int
    size: int
    num_classes: int
    warmup: int
    dtype: torch.dtype
    device: torch.device
    autocast: Autocast = nullcontext

    @property
    def name(self) -> str:
        """The teacher's: owner of random draws, suffix of players' names."""
        return self.teacher.name

    @property
    def span(self) -> tuple[int, int]:
        """This rank's slice [low, high) of the row's images."""
        return bounds(self.batch, self.mesh.row.size, self.mesh.row.rank)

    def own(self) -> Tensor:
        """Indices of this rank's slice, on the device."""
        return torch.arange(*self.span, device=self.device)

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's slice of what the row has together, on the device."""
        low, high = self.span
        return whole[low:high].to(self.device)

    def whole(self, part: Tensor) -> Tensor:
        """The row's slices in index order, on each of its ranks; carries no gradient."""
        row = self.mesh.row
        if row.size == 1:
            return part.detach()
        spans = [bounds(self.batch, row.size, r) for r in range(row.size)]
        longest = max(high - low for low, high in spans)
        padded = torch.cat([part.detach(), part.new_zeros(longest - len(part), *part.shape[1:])])
        parts = row.gather(padded)
        return torch.cat([part[: high - low] for part, (low, high) in zip(parts, spans, strict=True)])

    def labels(self, how: Literal["balanced", "random"], round: int) -> Tensor:
        """`[n]` labels that this rank's images of a round are to have.

        Balanced: images are numbered through all rounds, and the classes take turns. Random: uniform.
        """
        own = self.own()
        if how == "balanced":
            return (own + round * self.batch) % self.num_classes
        return self.randomness.integers("labels", own, self.num_classes, owner=self.name, round=round)

    def one(self, purpose: str, high: int, count: int, round: int, step: int) -> list[int]:
        """`count` numbers in [0, high) for the whole batch of an iteration, the same on every rank; plain integers."""
        # On the CPU, so that nobody waits for a device.
        origin = torch.zeros(1, dtype=torch.int64, device="cpu")
        drawn = self.randomness.integers(purpose, origin, high, (count,), owner=self.name, round=round, step=step)
        return [int(n) for n in drawn[0].tolist()]

    def read(
        self, network: ImageNetwork, images_NCHW: Tensor, batch_norm: Literal["eval", "batch"], *, scaled: bool = False
    ) -> Tensor:
        """Logits of a network that nobody may change (the student); gradient reaches the images.

        `scaled` as `ImageNetwork.forward` takes it.
        """
        with reading_only(network, batch_norm, self.mesh.sync), self.autocast():
            return network(images_NCHW, scaled=scaled).logits_NC

    def total(self, losses: Losses) -> Tensor:
        """The row's total loss, 0-d, bit-equal on its ranks; carries no gradient."""
        return torch.stack(self.mesh.row.gather(losses.total.detach())).sum()
