"""Initial weights that do not depend on the number of ranks or on the order of building."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


class seeded:
    """A context in which torch's CPU generator is a function of (seed, names): initial weights at any world size."""

    def __init__(self, seed: int, *names: str) -> None:
        digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "little") >> 1
        self._fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)
