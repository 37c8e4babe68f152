"""Every sample of a set shown to the teachers (and to the student) once, chunk by chunk, spread over all ranks.

Each chunk is one batch of every network, and answers become fp32 on the CPU before anything is made of them. So no
number depends on how many ranks there are, nor on whether an answer is fresh or was kept on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfkd_dist.config import ImageSpec, ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pixels import to_image_space
from dfkd_dist.data.stream.quarantine import Quarantine
from dfkd_dist.data.stream.stream import RawBatch, scan
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.signals import LOGITS
from dfkd_dist.parallel.batchnorm import reading_only
from dfkd_dist.parallel.exchange import Exchange
from dfkd_dist.parallel.group import Group
from dfkd_dist.parallel.mesh import Mesh
from dfkd_dist.sources.answers_cache import KeptAnswers
from dfkd_dist.sources.selection_share import Share, together


@dataclass(frozen=True)
class Answered:
    """What the networks said about one chunk of this rank: n candidates, as `Share.ids` names them.

    Args:
        valid_n: bool; the logits of a sample that cannot be read mean nothing.
        teachers: fp32 `[n, C]` of each teacher on the CPU, in recipe order.
        student_NC: the same of the student, or None if it was not asked.
    """

    valid_n: NDArray[np.bool_]
    teachers: list[Tensor]
    student_NC: Tensor | None


class Images(NamedTuple):
    """A chunk's candidates as they were read: uint8 `[n, C, S, S]`, and bool `[n]`, whether they could be."""

    images_NCHW: Tensor
    valid_n: NDArray[np.bool_]


@dataclass(frozen=True)
class Panel:
    """The networks, and where they are.

    Args:
        mesh: groups.
        exchange: its teachers answer.
        cards: of all teachers.
        weights: w_k, summing to 1.
        image: canonical size and channels.
        dtype: of images.
        device: where networks live.
        cache: the folder that keeps answers.
    """

    mesh: Mesh
    exchange: Exchange
    cards: Sequence[Card]
    weights: Sequence[float]
    image: ImageSpec
    dtype: torch.dtype
    device: torch.device
    cache: Path


class Scoring:
    """One pass over the set after another; a step is one chunk on every rank, or none on one that has no more.

    Every rank calls everything alike.

    Args:
        share: the chunks of this rank.
        batch: samples of a chunk.
        panel: the networks.
        quarantine: is told of samples that cannot be read.
    """

    def __init__(self, share: Share, batch: int, panel: Panel, quarantine: Quarantine) -> None:
        self.share, self.batch, self.panel, self.quarantine = share, batch, panel, quarantine
        self.reader: ReaderSpec = share.reader
        self.world: Group = share.world
        self._teachers = Exchange(
            panel.mesh,
            panel.exchange.teachers,
            [{LOGITS: (card.num_classes,)} for card in panel.cards],
            frozenset({LOGITS}),
        )
        self._opened: KeptAnswers | None = None
        self._coming: Iterator[RawBatch] = iter(())
        self._listed: deque[int] = deque()
        self._late: Exception | None = None

    @property
    def images(self) -> int:
        """Images of one step over all ranks."""
        return self.batch * self.world.size

    # ------------------------------------------------------------------------------------------ a pass

    def begin(self, ask_student: bool) -> None:
        """Start a pass from the first step.

        Raises:
            DatasetError: on all ranks: some rank cannot keep answers, or cannot open the shards.
        """
        self.end()
        if self._opened is None:  # not before the first pass: a run's folder is made after its parts
            self._opened = together(self.world, self._open)
        together(self.world, lambda: self._begin(ask_student))

    def _begin(self, ask_student: bool) -> None:
        """Only what must be looked at is read and decoded, ahead of time and in the order of steps."""
        steps = range(len(self.share.chunks))
        self._listed = deque(
            s for s in steps if not self._empty(s) and (ask_student or not self.kept.has(self.share.first + s))
        )
        if self._listed:
            self._coming = self._scan(self._listed, self.reader)

    def step(self, step: int, student: ImageNetwork | None = None) -> Answered | None:
        """What is said about this rank's next chunk; None where it has no more.

        Raises:
            DatasetError, ValueError: on all ranks, where one of them cannot go on.
        """
        answers, raw = self._prepared(step, student is not None)
        missing = raw is not None and answers is None
        if self._anybody(missing):
            fresh = self._ask_teachers(raw if missing else None)
            if missing:
                assert raw is not None
                answers = fresh
                self._keep(step, raw, fresh)
        if answers is None:
            return None
        valid_n = np.ones(len(answers[0]), bool) if raw is None else raw.valid_n
        student_NC = None if student is None or raw is None else self._ask_student(raw, student)
        self._check(step, valid_n, answers, student_NC)
        return Answered(valid_n, answers, student_NC)

    def end(self) -> None:
        """End a pass: what went wrong after the last agreement is told now; reading workers go.

        Raises:
            DatasetError, ValueError: on all ranks.
        """
        close = getattr(self._coming, "close", None)
        if close is not None:
            close()
        self._coming = iter(())
        self._listed.clear()
        self._tell()

    @property
    def kept(self) -> KeptAnswers:
        """What was said before."""
        assert self._opened is not None, "begin comes first"
        return self._opened

    # ------------------------------------------------------------------------------------- one chunk

    def _prepared(self, step: int, ask_student: bool) -> tuple[list[Tensor] | None, Images | None]:
        """Kept answers and images, as far as they are there and wanted; failures wait for the agreement."""
        if self._late is not None or step >= len(self.share.chunks) or self._empty(step):
            return None, None
        try:
            chunk = self.share.chunks[step]
            kept = self.kept.read(self.share.first + step, chunk.start, chunk.count, self.share.places(chunk))
            return kept, self._read(step) if kept is None or ask_student else None
        except (DatasetError, OSError, RuntimeError) as error:
            self._late = error
            return None, None

    def _empty(self, step: int) -> bool:
        return bool(self.share.offsets[step] == self.share.offsets[step + 1])

    def _read(self, step: int) -> Images:
        while self._listed and self._listed[0] < step:  # meanwhile another run has kept what was said about them
            self._listed.popleft()
            next(self._coming)
        if self._listed and self._listed[0] == step:
            self._listed.popleft()
            raw = next(self._coming)
        else:  # its kept answers turned out to be torn, so it was not among those read ahead
            raw = next(self._scan([step], self.reader.model_copy(update={"workers": 0})))
        return Images(raw.images_NCHW, raw.valid_N.numpy())

    def _scan(self, steps: Iterable[int], reader: ReaderSpec) -> Iterator[RawBatch]:
        return scan(
            self.share.manifest,
            reader,
            batch=self.batch,
            size=self.panel.image.size,
            channels=self.panel.image.channels,
            chunks=[self.share.chunks[step] for step in steps],
            quarantine=self.quarantine,
            pin=self.panel.device.type == "cuda",
            places=self.share.places,
        )

    def _keep(self, step: int, raw: Images, fresh: Sequence[Tensor]) -> None:
        """Only chunks that could be read as a whole: what failed may succeed another time."""
        if not raw.valid_n.all():
            return
        chunk = self.share.chunks[step]
        try:
            self.kept.write(self.share.first + step, chunk.start, chunk.count, self.share.places(chunk), fresh)
        except DatasetError as error:  # the others hear of it at the next agreement
            self._late = error

    def _check(self, step: int, valid_n: NDArray[np.bool_], teachers: Sequence[Tensor], student: Tensor | None) -> None:
        """Scores of NaN have no place in an order, and infinite logits make them."""
        names = [f"teacher {k} (in the recipe's order)" for k in range(len(teachers))]
        for name, logits_NC in [*zip(names, teachers, strict=True), ("the student", student)]:
            if logits_NC is None or bool(logits_NC.isfinite().all()):
                continue
            bad_n = ~logits_NC.isfinite().all(dim=1).numpy() & valid_n
            if bad_n.any():
                shard, index = self.share.manifest.where(self.share.ids(self.share.chunks[step])[bad_n][:1])
                where = f"{self.share.manifest.shards[int(shard[0])].name}, index {int(index[0])}"
                self._late = self._late or ValueError(f"selection: {name} gives {where} logits that are not finite")

    # --------------------------------------------------------------------------------- all ranks together

    def _anybody(self, missing: bool) -> bool:
        """Whether any rank has images for the teachers; a rank that failed lets the others know."""
        flags = torch.tensor([missing, self._late is not None], dtype=torch.uint8)
        if self.world.size > 1:
            flags = self.world.all_reduce_max(flags.to(self.world.device_type)).cpu()
        missing_any, failed_any = flags.tolist()
        if failed_any:
            self._tell()
        return bool(missing_any)

    def _tell(self) -> None:
        late, self._late = self._late, None

        def act() -> None:
            if late is not None:
                raise late

        together(self.world, act)

    def _ask_teachers(self, raw: Images | None) -> list[Tensor]:
        """fp32 logits of every teacher; a rank without images may have teachers that others ask."""
        if raw is None and self.panel.mesh.column.size == 1:
            return []
        batch = self._teachers.own(self._on_device(raw), self.share.largest, self.images)
        return [signals.logits_NC.float().cpu() for signals in self._teachers.answers(batch)]

    def _ask_student(self, raw: Images, student: ImageNetwork) -> Tensor:
        with torch.no_grad(), reading_only(student, "eval"):
            return student(self._on_device(raw)).logits_NC.float().cpu()

    def _on_device(self, raw: Images | None) -> Tensor:
        image, dtype, device = self.panel.image, self.panel.dtype, self.panel.device
        if raw is None:
            return torch.zeros(0, image.channels, image.size, image.size, dtype=dtype, device=device)
        return to_image_space(raw.images_NCHW.to(device, non_blocking=True), dtype)

    def _open(self) -> KeptAnswers:
        panel = self.panel
        teachers = [teacher for teacher in panel.exchange.teachers if isinstance(teacher, nn.Module)]
        samples = len(self.share.manifest)
        return KeptAnswers(panel.cache, self._facts(), teachers, panel.cards, samples, panel.mesh)

    def _facts(self) -> Mapping[str, Any]:
        """Whatever could move the last bit of an answer, besides the teacher."""
        part = {} if self.reader.fraction == 1 else {"fraction": self.reader.fraction, "seed": self.share.seed}
        return {
            "manifest": self.share.manifest.digest,
            "reader": self.reader.kind,
            "size": self.panel.image.size,
            "channels": self.panel.image.channels,
            "batch": self.batch,
            "dtype": str(self.panel.dtype),
            "device": self.panel.device.type,
            "torch": torch.__version__,
        } | part
