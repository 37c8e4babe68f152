"""Selections that look at the images: the best by score once (DFND, MosaicKD), or anew in every round (KD3)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softmax

from dfkd_dist.config import RoundsSpec, SelectionSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.losses import kd3_selection as kd3
from dfkd_dist.losses.scores import mean_probs, scores, surest
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.parallel.randomness import Randomness
from dfkd_dist.parallel.topn import top_n, top_n_balanced
from dfkd_dist.sources.selection_scoring import Answered, Scoring
from dfkd_dist.sources.selection_share import unpacked

log = logging.getLogger(__name__)

_BLOCK = 1 << 16


class ScoredSelector(ABC):
    """A pass over the set, then a choice. See `sources.selection.Selector`."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring, self.share = scoring, scoring.share
        self._at: tuple[int, int] | None = None
        self._made: tuple[int, NDArray[np.bool_]] | None = None
        self.valid_n = np.zeros(int(self.share.offsets[-1]), bool)
        """Which of this rank's candidates could be read."""

    @property
    def images(self) -> int:
        """Images of one step over all ranks."""
        return self.scoring.images

    def steps(self, round: int) -> int:
        """See Selector."""
        return self.share.steps if self._chooses_in(round) else 0

    def score(self, round: int, step: int, student: ImageNetwork | None) -> None:
        """See Selector.

        Raises:
            DatasetError, ValueError: on all ranks, where one cannot go on.
        """
        asked = student if self._asks_student(round) else None
        first = step
        if self._at != (round, step):  # a new pass, or one that an earlier process began
            self.scoring.begin(asked is not None)
            self._begin()
            first = 0
        for s in range(first, step + 1):
            answered = self.scoring.step(s, asked)
            if answered is not None:
                at = slice(int(self.share.offsets[s]), int(self.share.offsets[s + 1]))
                self.valid_n[at] = answered.valid_n
                self._add(round, at, answered)
        self._at = round, step + 1
        if step + 1 == self.share.steps:
            self.scoring.end()
            self._made = round, self.share.united(self._choose(round))
            self._tell(round, self._made[1])

    def chosen(self, round: int) -> NDArray[np.bool_]:
        """See Selector.

        Raises:
            RuntimeError: the choice has not been made.
        """
        if self._made is None or (self._chooses_in(round) and self._made[0] != round):
            raise RuntimeError(f"the selection of round {round} is asked for before it was made")
        return self._made[1]

    def state_dict(self) -> dict[str, Any]:
        """The choice as packed bits, and the round that it was made in; empty before the first."""
        if self._made is None:
            return {}
        round, mask_N = self._made
        return {"round": round, "samples": len(mask_N), "bits": torch.from_numpy(np.packbits(mask_N))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a choice.

        Raises:
            DatasetError: it was made among another number of samples.
        """
        self._at = self._made = None
        if not state:
            return
        samples = len(self.share.manifest)
        if state["samples"] != samples:
            raise DatasetError(
                f"the checkpoint's selection is among {state['samples']} samples, but "
                f"{self.share.manifest.path} has {samples}"
            )
        self._made = int(state["round"]), unpacked(state["bits"].numpy(), samples)

    def read(self) -> int:
        """How many candidates could be read, over all ranks."""
        return self._total(int(self.valid_n.sum()))

    def _total(self, count: int) -> int:
        world = self.share.world
        if world.size == 1:
            return count
        return int(world.sum_(torch.tensor([count], device=world.device_type)))

    def _tell(self, round: int, mask_N: NDArray[np.bool_]) -> None:
        read, candidates = self.read(), self.share.candidates
        if self.share.world.rank == 0:
            bad = f", {candidates - read} could not be read" if read < candidates else ""
            log.info("round %d: %d of %d samples chosen%s", round, int(mask_N.sum()), candidates, bad)

    @abstractmethod
    def _chooses_in(self, round: int) -> bool:
        """Whether this round makes a choice."""

    @abstractmethod
    def _asks_student(self, round: int) -> bool:
        """Whether it takes the student's answers."""

    @abstractmethod
    def _begin(self) -> None:
        """Forget what was added."""

    @abstractmethod
    def _add(self, round: int, at: slice, answered: Answered) -> None:
        """Take in a chunk; `at` is its place among this rank's candidates."""

    @abstractmethod
    def _choose(self, round: int) -> NDArray[np.bool_]:
        """bool, for each of this rank's candidates."""


class TopSelector(ScoredSelector):
    """The `count` samples with the highest (or lowest) score, chosen once before the first round.

    By the weighted mean of the teachers' probabilities: DFND takes the highest confidence, MosaicKD the highest
    entropy (or, in KDCI's appendix, the lowest confidence). Samples that cannot be read are never chosen; where fewer
    than `count` can be, all of them are, and the log says so.

    Args:
        spec: `score`, `order`, `count`, `balanced`.
        scoring: the teachers' answers.
        details: also keep each candidate's pseudo-label and surest teacher.

    Raises:
        DatasetError: `count` is more than there are.
    """

    def __init__(self, spec: SelectionSpec, scoring: Scoring, *, details: bool = False) -> None:
        super().__init__(scoring)
        assert spec.count is not None
        self.spec, self.count = spec, spec.count
        self.share.check(self.count)
        n = len(self.valid_n)
        self.scores_n = np.zeros(n, np.float32)
        """Of this rank's candidates; of the confidence, smaller is more confident (see `losses.scores`)."""
        self.labels_n = np.zeros(n if details or spec.balanced else 0, np.int32)
        """Pseudo-labels, where they are kept."""
        self.teachers_n = np.zeros(n if details else 0, np.uint8)
        """The surest teacher of each, where it is kept."""

    def _chooses_in(self, round: int) -> bool:
        return round == 0

    def _asks_student(self, round: int) -> bool:
        return False

    def _begin(self) -> None:
        """Every number is written anew."""

    def _add(self, round: int, at: slice, answered: Answered) -> None:
        found = scores(answered.teachers, self.scoring.panel.weights)
        of = found.confidence_N if self.spec.score == "confidence" else found.entropy_N
        self.scores_n[at] = of.numpy()
        if len(self.labels_n):
            self.labels_n[at] = found.labels_N.numpy()
        if len(self.teachers_n):
            self.teachers_n[at] = surest(answered.teachers).numpy()

    def _choose(self, round: int) -> NDArray[np.bool_]:
        valid_n, world = self.valid_n, self.share.world
        read = self.read()
        if read < self.count and world.rank == 0:
            log.warning("only %d samples can be read, fewer than source.selection.count: %d", read, self.count)
        # A high confidence is a small score.
        largest = (self.spec.order == "highest") == (self.spec.score == "entropy")
        chosen_n = np.zeros(len(valid_n), bool)
        scores_n, ids_n = self.scores_n[valid_n], self.share.own_ids()[valid_n]
        if self.spec.balanced:
            labels_n = self.labels_n[valid_n].astype(np.int64)
            classes = self.scoring.panel.cards[0].num_classes
            chosen_n[valid_n] = top_n_balanced(scores_n, ids_n, labels_n, self.count, classes, world, largest=largest)
        else:
            chosen_n[valid_n] = top_n(scores_n, ids_n, self.count, world, largest=largest)
        return chosen_n


class KD3Selector(ScoredSelector):
    """Teacher-student dynamic instance selection, anew in every round (KD3 Eqs. 2-8); t is the round, I their number.

    The student is read in eval mode. Counts n_i are summed over all ranks, so thresholds are those of the whole set.
    Once the teachers' answers are kept, a round asks the student alone, and only while alpha(t) gives it a share.

    Args:
        spec: `threshold`, `counts`, `mode`.
        scoring: the answers.
        rounds: their number; t counts from the end of the warm-up.
    """

    def __init__(self, spec: SelectionSpec, scoring: Scoring, rounds: RoundsSpec) -> None:
        super().__init__(scoring)
        self.spec, self.rounds = spec, rounds
        self.classes = scoring.panel.cards[0].num_classes
        self.labels_n = np.zeros(len(self.valid_n), np.int32)
        """y_i of Eq. 5."""
        self.confidence_n = np.zeros(len(self.valid_n), np.float32)
        """p_i of Eq. 5."""
        self.counts_C = torch.zeros(self.classes, dtype=torch.int64)
        """n_i before Eq. 6, of this rank's samples."""

    def alpha(self, round: int) -> float:
        """The student's share in Eq. 3: Eq. 4, or fixed by `mode`."""
        fixed = {"teacher": 0.0, "student": 1.0}.get(self.spec.mode)
        return kd3.alpha(max(round - self.rounds.warmup, 0), self.rounds.main) if fixed is None else fixed

    def _chooses_in(self, round: int) -> bool:
        return True

    def _asks_student(self, round: int) -> bool:
        return self.alpha(round) > 0

    def _begin(self) -> None:
        self.counts_C.zero_()

    def _add(self, round: int, at: slice, answered: Answered) -> None:
        labels_N, confidence_N = kd3.predict(self._combined(round, answered))
        valid_N = torch.from_numpy(answered.valid_n)
        # As it is kept: what is counted and what is compared must be the same number.
        confidence_N = confidence_N.float()
        self.counts_C += kd3.class_counts(
            labels_N[valid_N], confidence_N[valid_N], self.classes, self.spec.counts, self.spec.threshold
        )
        self.labels_n[at], self.confidence_n[at] = labels_N.numpy(), confidence_N.numpy()

    def _combined(self, round: int, answered: Answered) -> Tensor:
        teacher_NC, _ = mean_probs(answered.teachers, self.scoring.panel.weights)
        if answered.student_NC is None:
            return teacher_NC
        return kd3.combine(teacher_NC, softmax(answered.student_NC.double(), dim=1), self.alpha(round))

    def _choose(self, round: int) -> NDArray[np.bool_]:
        world = self.share.world
        counts_C = self.counts_C.clone()
        if world.size > 1:
            counts_C = world.sum_(counts_C.to(world.device_type)).cpu()
        thresholds_C = kd3.thresholds(counts_C, self.spec.threshold)
        chosen_n = self.valid_n.copy()
        for start in range(0, len(chosen_n), _BLOCK):
            at = slice(start, start + _BLOCK)
            labels_b = torch.from_numpy(self.labels_n[at].astype(np.int64))
            chosen_n[at] &= kd3.select(labels_b, torch.from_numpy(self.confidence_n[at]), thresholds_C).numpy()
        return self._as_many_at_random(round, chosen_n) if self.spec.mode == "random" else chosen_n

    def _as_many_at_random(self, round: int, chosen_n: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Table 2, "Random": the number that the dynamic rule would take, whichever they are."""
        count, ids_n = self._total(int(chosen_n.sum())), self.share.own_ids()[self.valid_n]
        drawn_n = own_numbers(self.share.seed, ids_n, round)
        out_n = np.zeros(len(chosen_n), bool)
        out_n[self.valid_n] = top_n(drawn_n, ids_n, count, self.share.world, largest=False)
        return out_n


def own_numbers(seed: int, ids_n: NDArray[np.int64], round: int = 0) -> NDArray[np.float32]:
    """fp32 uniforms on [0, 1), each a function of the sample (and the round) alone."""
    return Randomness(seed).uniform("selection", torch.from_numpy(ids_n), round=round).numpy()
