"""The only place that turns a recipe into objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dfkd_dist.compensation.kdci import KDCI
from dfkd_dist.config import (
    AnyObjectiveSpec,
    AssistantSpec,
    GenerativeSpec,
    InversionSpec,
    LabelledSpec,
    MosaicSpec,
    Recipe,
    RecipeError,
    SplitSpec,
    StreamSpec,
)
from dfkd_dist.data.datasets import ImageSet, load_image_set
from dfkd_dist.data.pool import Pool
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.splits import party_indices
from dfkd_dist.data.stream.sets import open_set
from dfkd_dist.engine.build_inversion import inversion_source, make_pool
from dfkd_dist.engine.build_mosaic import RealImages, mosaic_source, real_images
from dfkd_dist.engine.build_streams import Place, stream_source
from dfkd_dist.engine.checks import agreed, check_generator_terms, check_maps, check_student_classes
from dfkd_dist.engine.metrics import Meters
from dfkd_dist.engine.optim import make_player
from dfkd_dist.engine.seeding import seeded
from dfkd_dist.engine.segmentation import check_task
from dfkd_dist.engine.sharing import fitted_card, take_classifier
from dfkd_dist.engine.student_side import StudentSide
from dfkd_dist.engine.teachers import make_teacher, reference_classes, teacher_cards, teacher_costs, teacher_weights
from dfkd_dist.engine.trainer import Trainer
from dfkd_dist.models.cards import Card
from dfkd_dist.models.dcgan import make_generator
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import FEATURES, LOGITS, MAP, Need
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.models.weights import load_weights
from dfkd_dist.objectives.registry import Context, make_objective, needed, needs
from dfkd_dist.parallel.batchnorm import synchronise
from dfkd_dist.parallel.exchange import Exchange, Shapes
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.mesh import Mesh, make_mesh
from dfkd_dist.parallel.player import Player
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.stopping import StopFlag
from dfkd_dist.parallel.topology import make_topology
from dfkd_dist.sources.assistants import Pupil
from dfkd_dist.sources.base import Source
from dfkd_dist.sources.generative import GenerativeSource, Kit
from dfkd_dist.sources.labelled import LabelledSource


@dataclass(frozen=True)
class Build:
    """A recipe's objects on this rank."""

    recipe: Recipe
    mesh: Mesh
    device: torch.device
    cards: list[Card]
    """Every teacher's, on every rank."""
    teachers: list[Teacher]
    """This rank's teachers, answering copies."""
    student_card: Card
    side: StudentSide
    source: Source
    trainer: Trainer


def build(recipe: Recipe, device: torch.device, world_size: int = 1, stop_flag: StopFlag | None = None) -> Build:
    """Everything this rank needs; every rank calls it alike.

    Raises:
        RecipeError, WeightsError, DatasetError, ValueError: what is wrong, before any training.
    """
    _set_backends(recipe)
    cards = teacher_cards(recipe)
    topology = make_topology(world_size, teacher_costs(cards), recipe.mesh.rows)
    mesh = make_mesh(topology, device, recipe.mesh.sync)
    return _Builder(recipe, device, mesh, cards).build(stop_flag or StopFlag())


def _set_backends(recipe: Recipe) -> None:
    torch.set_flush_denormal(True)  # denormals slow a small generator-teacher loop down several times
    torch.backends.cudnn.benchmark = True  # shapes are the same at every step
    torch.backends.cuda.matmul.allow_tf32 = recipe.precision.tf32
    torch.backends.cudnn.allow_tf32 = recipe.precision.tf32


class _Builder:
    def __init__(self, recipe: Recipe, device: torch.device, mesh: Mesh, cards: list[Card]) -> None:
        self.recipe, self.device, self.mesh, self.cards = recipe, device, mesh, cards
        self.dtype = torch.float64 if recipe.precision.train == "fp64" else torch.float32
        self.weights = teacher_weights(recipe)
        self.randomness = Randomness(recipe.seed)
        self.manifest = self._manifest()

    def build(self, stop_flag: StopFlag) -> Build:
        recipe, rounds = self.recipe, self.recipe.rounds
        pairs = agreed(self.mesh.world, lambda: [self._teacher(k) for k in self.mesh.teachers])
        teachers = [answering for _, answering in pairs]
        shapes = self._all_shapes(teachers)
        self._check_maps(shapes)
        exchange = Exchange(self.mesh, teachers, shapes, needed(recipe.objective))
        sealed = [teacher for teacher, _ in pairs]
        student_card = self._student_card()
        with _named("student"):
            student_card = fitted_card(recipe.objective, student_card, sealed)
        student = self._network(student_card, "student", self.mesh.sync_world, recipe.student.pretrained)
        if recipe.student.weights is not None:
            with _named("student.weights"):
                load_weights(student.network, recipe.student.weights)
        with _named("student"):
            take_classifier(recipe.objective, student, sealed)
        side = self._side(student, recipe.objective, self.weights, shapes, "student")
        student_steps = None if rounds.student_steps == "epoch" else rounds.student_steps
        steps = rounds.main * (student_steps or 1)
        player = make_player("student", side, recipe.optimizer, recipe.schedule, steps, self.mesh.world)
        source = self._source(pairs, shapes, exchange, student_card)
        trainer = Trainer(
            source,
            player,
            exchange,
            self.mesh,
            warmup=rounds.warmup,
            rounds=rounds.total,
            student_steps=student_steps,
            meters=Meters(self.device),
            stop_flag=stop_flag,
            autocast=self.autocast(),
        )
        return Build(recipe, self.mesh, self.device, self.cards, teachers, student_card, side, source, trainer)

    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """bf16 for networks that train; the weights stay fp32."""
        if self.recipe.precision.train != "bf16":
            return nullcontext
        return lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)

    # ------------------------------------------------------------------------------------- streams

    def _manifest(self) -> Manifest | None:
        """Of the shards that the source reads; every rank reads it."""
        source = self.recipe.source
        reader = source.reader if isinstance(source, StreamSpec | MosaicSpec) else None
        if reader is None:
            return None
        with _named("source.reader.shards"):
            return agreed(self.mesh.world, lambda: open_set(reader))

    # ----------------------------------------------------------------------------------- networks

    def _teacher(self, k: int) -> tuple[Teacher, Teacher]:
        teacher, answering = make_teacher(self.recipe, k, self.cards, self.device, self.recipe.precision)
        check_generator_terms(self.recipe, teacher, self.cards[k].arch)
        return teacher, answering

    def _check_maps(self, shapes: Sequence[Shapes]) -> None:
        source, named = self.recipe.source, [f"teacher {spec.name}" for spec in self.recipe.teachers]
        teachers = dict(zip(named, shapes, strict=True))
        check_maps("objective", self.recipe.objective, teachers)
        if isinstance(source, GenerativeSpec | InversionSpec) and source.assistant is not None:
            check_maps("source.assistant.objective", source.assistant.objective, teachers)

    def _asked(self) -> Need:
        """Signals that the student's objective or an assistant's wants from the teachers."""
        source, need = self.recipe.source, needed(self.recipe.objective)
        assistant = source.assistant if isinstance(source, GenerativeSpec | InversionSpec) else None
        return need if assistant is None else need | needed(assistant.objective)

    def _all_shapes(self, teachers: Sequence[Teacher]) -> list[Shapes]:
        """Signal shapes of every teacher of the run, told by the ranks that hold them."""
        own = {k: self._shapes(t) for k, t in zip(self.mesh.teachers, teachers, strict=True)}
        known = {k: shapes for part in self.mesh.column.gather_objects(own) for k, shapes in part.items()}
        return [known[k] for k in sorted(known)]

    def _shapes(self, network: ImageNetwork, need: Need | None = None) -> Shapes:
        """Of the usual signals, and of those named: what an objective wants from the network (a teacher, if None)."""
        need = self._asked() if need is None else need
        need = need | {LOGITS, FEATURES, MAP}
        return network.shapes(self.recipe.image.size, self.recipe.image.channels, need)

    def _student_card(self) -> Card:
        """The student's input normalisation is the mean of the teachers', unless the recipe says otherwise."""
        recipe, spec = self.recipe, self.recipe.student
        channels = recipe.image.channels
        mean = spec.mean or _average([c.mean for c in self.cards if c.channels == channels]) or [0.5] * channels
        std = spec.std or _average([c.std for c in self.cards if c.channels == channels]) or [0.25] * channels
        reference = reference_classes(self.cards)
        check_student_classes(recipe, reference)
        classes = spec.classes or reference
        with _named("student"):
            return Card(spec.arch, recipe.num_classes, spec.size or recipe.image.size, channels, mean, std, classes)

    def _network(self, card: Card, name: str, group: Group, pretrained: bool = False) -> ImageNetwork:
        with seeded(self.recipe.seed, "network", name), _named(name):
            network = ImageNetwork(card.build(pretrained), card.preprocess(self.recipe.image.size), name)
        synchronise(network, group)
        return self._placed(network)

    def _side(
        self,
        network: ImageNetwork,
        objective: AnyObjectiveSpec,
        weights: Sequence[float],
        shapes: Sequence[Shapes],
        name: str,
    ) -> StudentSide:
        own = self._shapes(network, needs(objective).student)
        check_maps("objective" if name == "student" else "source.assistant.objective", objective, {name: own})
        check_task(self.recipe, name, own, shapes)
        with seeded(self.recipe.seed, "objective", name):
            made = make_objective(objective, self._context(weights, own, shapes, name))
            compensation = self._compensation() if name == "student" else None
            return self._placed(StudentSide(network, made, compensation))

    def _compensation(self) -> KDCI | None:
        spec, classes = self.recipe.compensation, self.recipe.num_classes
        if spec is None:
            return None
        return KDCI(spec, classes, classes, self.weights, self.mesh.world, self.randomness)

    def _context(self, weights: Sequence[float], own: Shapes, shapes: Sequence[Shapes], name: str) -> Context:
        samples = None if self.manifest is None else len(self.manifest)  # ids run up to this
        mesh, classes = self.mesh, self.recipe.num_classes
        # The student's batch is the world's, an assistant's its row's.
        sync, ranks = (mesh.sync_world, mesh.world) if name == "student" else (mesh.sync, mesh.row)
        return Context(weights, own, shapes, classes, samples, sync, self.randomness, ranks)

    def _placed(self, module: Any) -> Any:
        module = module.to(self.device, self.dtype)
        return module.to(memory_format=torch.channels_last) if self.recipe.precision.channels_last else module

    # ------------------------------------------------------------------------------------- sources

    def _source(
        self,
        pairs: Sequence[tuple[Teacher, Teacher]],
        shapes: Sequence[Shapes],
        exchange: Exchange,
        student_card: Card,
    ) -> Source:
        recipe = self.recipe
        if isinstance(recipe.source, LabelledSpec):
            with _named("source.dataset"):
                images = load_image_set(recipe.source.dataset, "train")
                return self._labelled(recipe.source, images, exchange if recipe.teachers else None)
        if isinstance(recipe.source, StreamSpec):
            assert self.manifest is not None
            return stream_source(self._place(), recipe.source, self.manifest, exchange)
        if isinstance(recipe.source, InversionSpec):
            sealed = [teacher for teacher, _ in pairs]
            pool, autocast = self._pool(recipe.source), self.autocast()
            pupils = self._pupils(recipe.source, pairs, shapes, student_card)
            return inversion_source(
                self._place(), recipe.source, sealed, exchange, student_card, self._placed, autocast, pool, pupils
            )
        kits = [
            self._kit(recipe.source, k, teacher, answering, shapes[k], student_card)
            for k, (teacher, answering) in zip(self.mesh.teachers, pairs, strict=True)
        ]
        if isinstance(recipe.source, MosaicSpec):
            real, autocast = self._real_images(recipe.source, exchange), self.autocast()
            return mosaic_source(self._place(), recipe.source, kits, exchange, real, self._placed, autocast)
        return GenerativeSource(
            recipe.source,
            recipe.rounds,
            recipe.batch,
            kits,
            self.mesh,
            exchange,
            self.randomness,
            recipe.augment,
            self.dtype,
            self.device,
            self.autocast(),
        )

    def _pupils(
        self,
        spec: InversionSpec,
        pairs: Sequence[tuple[Teacher, Teacher]],
        shapes: Sequence[Shapes],
        student_card: Card,
    ) -> list[Pupil]:
        if spec.assistant is None:
            return []
        return [
            Pupil(k, answering, self._assistant(spec.assistant, k, teacher, shapes[k], student_card))
            for k, (teacher, answering) in zip(self.mesh.teachers, pairs, strict=True)
        ]

    def _pool(self, spec: InversionSpec) -> Pool:
        return make_pool(self._place(), spec)

    def _place(self) -> Place:
        return Place(self.recipe, self.mesh, self.device, self.dtype, self.randomness, self.cards, self.weights)

    def _real_images(self, spec: MosaicSpec, exchange: Exchange) -> RealImages:
        return real_images(self._place(), spec, self.manifest, exchange)

    def _kit(
        self, spec: GenerativeSpec, k: int, teacher: Teacher, answering: Teacher, shapes: Shapes, student_card: Card
    ) -> Kit:
        rounds, g, image = self.recipe.rounds, spec.generator, self.recipe.image
        with seeded(self.recipe.seed, "generator", teacher.name):
            module = make_generator(g.style, g.latent, g.width, g.blocks, image.size, image.channels, g.head)
        synchronise(module, self.mesh.sync)
        steps = rounds.warmup if spec.freeze_after_warmup else rounds.total
        name = f"generator/{teacher.name}"
        generator = make_player(name, self._placed(module), spec.optimizer, spec.schedule, steps, self.mesh.row)
        if spec.assistant is None:
            return Kit(teacher, answering, generator, None)
        return Kit(teacher, answering, generator, self._assistant(spec.assistant, k, teacher, shapes, student_card))

    def _assistant(self, spec: AssistantSpec, k: int, teacher: Teacher, shapes: Shapes, student_card: Card) -> Player:
        card = {"teacher": self.cards[k], "student": student_card}.get(spec.arch)
        card = card or Card(**{**vars(student_card), "arch": spec.arch})
        name = f"assistant/{teacher.name}"
        network = self._network(card, name, self.mesh.sync, spec.pretrained)
        side = self._side(network, spec.objective, [1.0], [shapes], name)
        steps = self.recipe.rounds.main * spec.steps
        return make_player(name, side, spec.optimizer, spec.schedule, steps, self.mesh.row)

    def _labelled(self, spec: LabelledSpec, images: ImageSet, exchange: Exchange | None) -> LabelledSource:
        indices = torch.arange(len(images))
        if spec.split is not None and spec.party is not None:
            indices = party_shares(images, spec.split)[spec.party]
        return LabelledSource(
            images,
            indices,
            self.recipe.batch,
            self.mesh.world,
            self.randomness,
            self.recipe.augment,
            self.dtype,
            self.device,
            exchange,
            spec.crop,
        )


def party_shares(images: ImageSet, split: SplitSpec) -> list[torch.Tensor]:
    """Positions of each party's images in a training set (DFMF section 4.1).

    Where pixels have the labels, images are of no class, and every party gets an even part of them all.

    Raises:
        RecipeError: an imbalanced split of such a set.
    """
    if images.of_pixels and split.mode == "ibl":
        raise RecipeError("split.mode is ibl, which deals images by their class, but here pixels have the labels")
    return party_indices(
        torch.zeros(len(images), dtype=torch.int64) if images.of_pixels else images.labels_N,
        parties=split.parties,
        mode=split.mode,
        ratio=split.ratio,
        seed=split.seed,
        num_classes=len(images.classes),
    )


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Errors say which part of the recipe they are about."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{part}: {error}") from error


def _average(rows: Sequence[Sequence[float]]) -> list[float] | None:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
