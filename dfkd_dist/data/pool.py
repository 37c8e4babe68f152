"""What a synthesis made, kept for reuse: the newest images in memory, full shards of them on disk.

Image i of the pool is the i-th that was made. Shard s holds the images from s * `size` on, is written when it is full
and never again; the images behind the last full shard are part of the state. So a state is the names and check sums of
shards and less than a shard's images, whatever was made so far. Shards that no state knows of (those of a run that was
killed before it could save) are replaced by the next ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.pool_memory import Column, Recent
from dfkd_dist.data.pool_shards import Piece, PoolShards
from dfkd_dist.data.shards.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Made:
    """Images of a pool, with what is known of each.

    Args:
        images_NCHW: uint8.
        labels_N: int64, what each was to show.
        teachers_N: int64, the teacher (in recipe order) that each was made for.
        logits_NKC: every teacher's answer about the image as it is kept, or None where answers are not kept.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    teachers_N: Tensor
    logits_NKC: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images_NCHW)

    def facts(self) -> dict[str, Tensor]:
        """What is known of the images, by name."""
        return {name: value for name, value in vars(self).items() if name != "images_NCHW" and value is not None}


class Pool:
    """The pool of a run; every rank holds the same one, and one of them writes its shards.

    Args:
        channels: of the images.
        side: of the images.
        capacity: images in memory; with shards at least those of one `add` and one shard.
        device: where they lie.
        shards: where full shards go; None keeps all in memory.
    """

    def __init__(
        self, channels: int, side: int, capacity: int, device: torch.device, shards: PoolShards | None = None
    ) -> None:
        self.shards, self.device = shards, device
        self._images = Recent(capacity, (channels, side, side), torch.uint8, device)
        # Small beside the images, so all of them stay, in the machine's memory.
        self._facts: dict[str, Column] = {}
        self._waiting: Tensor | None = None
        """After a state was put back: its images behind the shards, until somebody needs images."""

    def __len__(self) -> int:
        """Number of images."""
        return self._images.end if self._waiting is None else self._written + len(self._waiting)

    # -------------------------------------------------------------------------------------------- writing

    def add(self, made: Made) -> None:
        """Take in images; write the `full_shards` before the next ones.

        Raises:
            ValueError: there is no room for so many that are on no disk.
        """
        held = len(self) - self._written + len(made)
        if held > self._images.capacity:
            raise ValueError(f"{held} images are in no shard yet, but only {self._images.capacity} fit in memory")
        self._fill()
        self._images.append(made.images_NCHW)
        for name, value in made.facts().items():
            self._facts.setdefault(name, Column()).append(value.cpu())

    @property
    def full_shards(self) -> int:
        """How many wait to be written."""
        return 0 if self.shards is None else len(self) // self.shards.size - len(self.shards.pieces)

    def write(self) -> list[Piece]:
        """Write the shards that are full; on one rank. All ranks are then told by `take_up`.

        Raises:
            DatasetError: the folder holds something else, or cannot be written.
        """
        if self.shards is None:
            return []
        first, size = len(self.shards.pieces), self.shards.size
        spans = [(number * size, (number + 1) * size) for number in range(first, first + self.full_shards)]
        return self.shards.write(self._span(*span) for span in spans)

    def take_up(self, pieces: list[Piece]) -> None:
        """Shards that were written: their images need not stay in memory any more."""
        if self.shards is not None:
            self.shards.pieces += pieces

    def finish(self) -> Manifest:
        """Write what is in no shard yet as a last, smaller one; on one rank. Nothing can be added any more.

        Raises:
            DatasetError: there are no shards or no images, or the folder cannot be written.
        """
        if self.shards is None or not len(self):
            raise DatasetError("a pool without images (or without a folder) makes no set of shards")
        self.take_up(self.write())
        rest = self._written
        if rest < len(self):
            self.take_up(self.shards.write([self._span(rest, len(self))]))
        return read_manifest(self.shards.folder)

    def seal(self) -> None:
        """After `finish`: everything known of the images into one file beside the manifest; on one rank.

        Raises:
            DatasetError: the folder cannot be written.
        """
        assert self.shards is not None
        self.shards.seal({name: column.rows for name, column in self._facts.items()})

    @property
    def _written(self) -> int:
        """Images in shards."""
        return 0 if self.shards is None else sum(piece.count for piece in self.shards.pieces)

    def _span(self, low: int, high: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Images that are in memory, and what is known of them, on the CPU."""
        self._fill()
        ids = torch.arange(low, high, device="cpu")
        facts = {name: column.rows[low:high] for name, column in self._facts.items()}
        return self._images.take(ids).cpu(), facts

    # -------------------------------------------------------------------------------------------- reading

    def read(self, ids_n: Tensor) -> Made:
        """Images by number, in that order, on the device.

        Args:
            ids_n: int64 on the CPU.

        Raises:
            DatasetError: a shard cannot be read.
        """
        self._fill()
        facts = {name: column.rows[ids_n].to(self.device) for name, column in self._facts.items()}
        return Made(self._read_images(ids_n), **facts)

    def fact(self, name: str) -> Tensor:
        """What is known of all images (a field of `Made`), on the CPU, as a view."""
        return self._facts[name].rows

    def _read_images(self, ids_n: Tensor) -> Tensor:
        if self.in_memory:
            return self._images.take(ids_n)
        assert self.shards is not None
        old_n = ids_n < self._images.start
        images_NCHW = self._images.take(torch.where(old_n, self._images.start, ids_n))
        if old_n.any():
            places_n = old_n.nonzero().flatten().to(self.device)
            images_NCHW[places_n] = self.shards.read(ids_n[old_n]).to(self.device)
        return images_NCHW

    @property
    def in_memory(self) -> bool:
        """Whether all images are."""
        return len(self) <= self._images.capacity

    def will_read(self, ids_n: Tensor) -> None:
        """These are asked for next: begin to fetch those that are not in memory."""
        if self.shards is not None:
            self.shards.fetch(ids_n[ids_n < self._images.start])

    def close(self) -> None:
        """End the reading ahead."""
        if self.shards is not None:
            self.shards.close()

    # ---------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Names and check sums of the shards, and the images (with what is known of them) behind them."""
        images_NCHW, facts = self._span(self._written, len(self))
        pieces = [] if self.shards is None else [piece.reference() for piece in self.shards.pieces]
        # Copies: a view would be saved with all that it is a view of.
        behind = {name: rows.clone() for name, rows in facts.items()}
        return {"shards": pieces, "images": images_NCHW, "facts": behind}

    def load_state_dict(self, state: Mapping[str, Any], check: bool = True) -> None:
        """Put back what `state_dict` gave.

        Args:
            state: of a pool of the same run.
            check: compare the shards' bytes with their check sums (one rank is enough).

        Raises:
            DatasetError: a shard is missing or altered.
        """
        self._facts = {}
        if self.shards is not None:
            self._take_in(self.shards.reopen(state["shards"], check=check))
        elif state["shards"]:
            raise DatasetError("the state names shards, but this pool has none")
        self._take_in(state["facts"])
        self._waiting = state["images"]

    def _fill(self) -> None:
        """The newest images into memory, once after a state was put back (whoever only evaluates needs none)."""
        if self._waiting is None:
            return
        behind, held, self._waiting = self._written, self._waiting, None
        self._images.skip_to(max(0, min(behind, behind + len(held) - self._images.capacity)))
        while self._images.end < behind:
            assert self.shards is not None
            high = min(behind, self._images.end + self.shards.size)
            self._images.append(self.shards.read(torch.arange(self._images.end, high, device="cpu")))
        self._images.append(held)

    def _take_in(self, facts: Mapping[str, Tensor]) -> None:
        for name, rows in facts.items():
            self._facts.setdefault(name, Column()).append(rows)
