"""A small set of shards, two unlike teachers and a student, and the selectors over them on this rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from dfkd_dist.config import Recipe, SelectionSpec, parse
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.engine.teachers import make_teacher, teacher_cards, teacher_weights
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.mesh import Mesh, make_mesh
from dfkd_dist.parallel.topology import make_topology
from dfkd_dist.sources.selection import Selector, make_selector
from tests.recipes import CLASSES, stir
from tests.voters import speak_up

Tree = dict[str, Any]
CPU = torch.device("cpu")
ROUNDS = 4


def recipe(shards: Path, teachers: list[Tree], selection: Tree | None, reader: Tree | None = None) -> Recipe:
    """Selects in chunks of 4 images, read in this process."""
    chosen = None if selection is None else {"batch": 4, **selection}
    tree = {
        "name": "test",
        "method": "test",
        "image": {"size": 8, "channels": 3},
        "num_classes": CLASSES,
        "batch": 6,
        "rounds": {"main": ROUNDS},
        "teachers": teachers,
        "student": {"arch": "tiny"},
        "source": {
            "kind": "stream",
            "reader": {"shards": str(shards), "workers": 0, "bad_limit": 1.0, **(reader or {})},
            "selection": chosen,
        },
    }
    return parse(Recipe, tree)


class Selecting:
    """Everything of a recipe that a selection needs, on one rank of the joined world.

    Args:
        spec: of `recipe`.
        folder: of the run.
        size: of the world.
        rows: of the mesh.
        loud: change the teachers so that all classes occur.
    """

    def __init__(
        self, spec: Recipe, folder: Path, size: int = 1, rows: int | None = None, *, loud: bool = True
    ) -> None:
        self.recipe, self.folder = spec, folder
        self.cards: list[Card] = teacher_cards(spec)
        self.mesh: Mesh = make_mesh(make_topology(size, [1.0] * len(self.cards), rows), CPU)
        self.teachers = [make_teacher(spec, k, self.cards, CPU, spec.precision)[1] for k in self.mesh.teachers]
        if loud:
            side = SimpleNamespace(network=self.teachers[0])
            speak_up(cast(Any, SimpleNamespace(teachers=self.teachers[1:], side=side)))
        self.manifest: Manifest = read_manifest(spec.source.reader.shards)  # type: ignore[union-attr]
        self.asked = [Counting(teacher) for teacher in self.teachers]
        shapes = [{LOGITS: (CLASSES,)} for _ in self.cards]
        self.exchange = Exchange(self.mesh, self.asked, shapes, frozenset({LOGITS}))
        self.quarantine = Quarantine(None, self.mesh.rank)

    def selector(self) -> Selector:
        """As `engine.build_streams` makes it."""
        source: Any = self.recipe.source
        spec: SelectionSpec = source.selection
        return make_selector(
            spec,
            source.reader,
            self.manifest,
            mesh=self.mesh,
            exchange=self.exchange,
            teacher_weights=teacher_weights(self.recipe),
            cards=self.cards,
            image=self.recipe.image,
            rounds=self.recipe.rounds,
            seed=self.recipe.seed,
            folder=self.folder,
            dtype=torch.float32,
            device=CPU,
            quarantine=self.quarantine,
        )

    def images_asked(self) -> int:
        """How many images this rank's teachers have answered for."""
        return sum(teacher.images for teacher in self.asked)


class Counting(nn.Module):
    """A teacher that counts."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.images = teacher, 0

    def forward(self, images_NCHW: torch.Tensor, need: Any) -> Any:
        self.images += len(images_NCHW)
        return self.teacher(images_NCHW, need)


def student(seed: int = 5) -> ImageNetwork:
    """In train mode, as it is while a round begins."""
    torch.manual_seed(seed)
    card = Card("tiny", CLASSES, 8, 3, [0.5] * 3, [0.25] * 3)
    network = ImageNetwork(
        stir(build_network("tiny", num_classes=CLASSES, in_channels=3), seed), card.preprocess(), "s"
    )
    synchronise(network, ALONE)
    speak_up(cast(Any, SimpleNamespace(teachers=[], side=SimpleNamespace(network=network))))
    return network.train()


def select(selector: Selector, round: int, network: ImageNetwork | None = None) -> Any:
    """All steps of a round; the choice."""
    for step in range(selector.steps(round)):
        selector.score(round, step, network)  # type: ignore[arg-type]
    return selector.chosen(round)
