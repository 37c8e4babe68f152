"""All teachers' answers about the chunks of a set, kept on disk so that nobody is asked twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfkd_dist.data.answers import AnswerCache
from dfkd_dist.models.cards import Card
from dfkd_dist.parallel.mesh import Mesh


class KeptAnswers:
    """One `AnswerCache` for each teacher of the run: answers come home to the rank whose images they are about.

    Every rank of a column makes it alike.

    Args:
        folder: holds all caches.
        facts: what the answers depend on besides the teacher.
        teachers: this rank's.
        cards: of all teachers.
        samples: of the whole set.
        mesh: who holds which teacher.

    Raises:
        DatasetError: the files cannot be made, or the disk has no room.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        teachers: Sequence[nn.Module],
        cards: Sequence[Card],
        samples: int,
        mesh: Mesh,
    ) -> None:
        own = {k: digest_of(teacher) for k, teacher in zip(mesh.teachers, teachers, strict=True)}
        digests = {k: digest for part in mesh.column.gather_objects(own) for k, digest in part.items()}
        self.digests = [digests[k] for k in sorted(digests)]
        """Of every teacher of the run, in recipe order."""
        self._caches = [
            AnswerCache(folder, {**facts, "teacher": digest}, samples, card.num_classes)
            for digest, card in zip(self.digests, cards, strict=True)
        ]

    def has(self, chunk: int) -> bool:
        """Whether every teacher's answers claim to be there."""
        return all(cache.has(chunk) for cache in self._caches)

    def read(self, chunk: int, start: int, count: int, places_n: NDArray[np.int64]) -> list[Tensor] | None:
        """fp32 `[n, C]` of each teacher, or None where one is missing or torn.

        Args:
            chunk: its number.
            start: its first sample.
            count: its samples.
            places_n: which of them are wanted.
        """
        found = []
        for cache in self._caches:
            rows = cache.read(chunk, start, count)
            if rows is None:
                return None
            found.append(rows[torch.from_numpy(places_n)])
        return found

    def write(self, chunk: int, start: int, count: int, places_n: NDArray[np.int64], answers: Sequence[Tensor]) -> None:
        """Keep what every teacher said; samples that were left out become NaNs.

        Raises:
            DatasetError: the disk is full or fails.
        """
        for cache, logits_nC in zip(self._caches, answers, strict=True):
            rows_NC = torch.full((count, cache.classes), float("nan"))
            rows_NC[torch.from_numpy(places_n)] = logits_nC
            cache.write(chunk, start, rows_NC)

    def close(self) -> None:
        """Close the files."""
        for cache in self._caches:
            cache.close()


def digest_of(module: nn.Module) -> str:
    """sha256 of everything that a network's answers come from: layers, weights, buffers, preprocessing, format."""
    digest = hashlib.sha256(repr(module).encode())
    preprocess = getattr(module, "preprocess", None)
    told = [getattr(preprocess, "size", None), getattr(preprocess, "channels", None)]
    digest.update(repr([*told, getattr(module, "autocast_dtype", None)]).encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
