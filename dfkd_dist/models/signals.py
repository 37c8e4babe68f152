"""What networks say about images, and what travels between the parts of a method.

Shapes: N images, C classes, D channels of a feature map, H W its sides. What classifies pixels says logits and
features of every one: `[N, C, H, W]` and `[N, D, h, w]` stand where `NC` and `ND` are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOGITS, FEATURES, MAP, BN = "logits", "features", "map", "bn"
"""Names of signals: class scores, penultimate features, the last convolution's map, batch-norm input statistics."""

NAMED_MAP = "map:"
"""`map:layer2` is the output of the network's module `layer2`."""

MEANS = "means"
"""Each image's channel means at the batch norms' inputs, one layer after another, `[N, D]`."""

NAMED_MEANS = "means:"
"""`means:layer2` takes those at the input of the module `layer2`; several such stand in the order in which they run."""

_FIELDS = {LOGITS: "logits_NC", FEATURES: "features_ND", MAP: "map_NDHW", MEANS: "means_ND"}

Need = frozenset[str]
"""Which signals are wanted; only those are computed and sent."""


@dataclass(frozen=True)
class LayerStatistics:
    """First two moments of one batch-norm layer's input, beside those stored in training (DFMF Eq. 3)."""

    mean_C: Tensor
    var_C: Tensor
    stored_mean_C: Tensor
    stored_var_C: Tensor


@dataclass(frozen=True)
class Signals:
    """What one network says about a batch. Signals that were not asked for are None (or empty)."""

    logits_NC: Tensor
    features_ND: Tensor | None = None
    map_NDHW: Tensor | None = None
    bn: list[LayerStatistics] = field(default_factory=list)
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of named modules, `[N, D, H, W]`: those asked for as `map:MODULE`."""
    means_ND: Tensor | None = None
    """Per-instance channel means: those asked for as `means`, or as `means:MODULE`."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Signals:
        """From signal names to tensors, back to signals."""
        known = {_FIELDS[name]: tensor for name, tensor in tensors.items() if name in _FIELDS}
        maps = {name.removeprefix(NAMED_MAP): t for name, t in tensors.items() if name.startswith(NAMED_MAP)}
        return cls(**known, maps=maps)  # type: ignore[arg-type]

    def tensor(self, name: str) -> Tensor:
        """The per-image signal of that name (a member of a `Need`); not `bn`.

        Raises:
            ValueError: it was not asked for.
        """
        if name.startswith(NAMED_MAP):
            found = self.maps.get(name.removeprefix(NAMED_MAP))
        else:
            found = getattr(self, _FIELDS[MEANS if name.startswith(NAMED_MEANS) else name])
        if found is None:
            raise ValueError(f"signal {name!r} is not here: it was not asked for")
        return found

    def part(self, start: int, stop: int) -> Signals:
        """What was said about images `start` to `stop` (per-image signals only)."""
        return Signals.of({name: tensor[start:stop] for name, tensor in self._present()})

    def views(self, count: int) -> list[Signals]:
        """Signals of each of `count` versions of the same images that stand one after another in the batch."""
        size = len(self.logits_NC) // count
        return [self.part(v * size, (v + 1) * size) for v in range(count)]

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        for name, attribute in _FIELDS.items():
            if getattr(self, attribute) is not None:
                yield name, getattr(self, attribute)
        yield from ((NAMED_MAP + name, tensor) for name, tensor in self.maps.items())

    @staticmethod
    def joined(parts: Sequence[Signals]) -> Signals:
        """One network's signals about several batches, one after another; all hold the same signals."""
        names = [name for name, _ in parts[0]._present()]
        return Signals.of({name: torch.cat([part.tensor(name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Batch:
    """Images for the student on this rank.

    `count` is the number of valid images over all ranks: what per-sample loss sums are divided by.
    `column_NCHW` are all images of this rank's column of the mesh, which its teachers must answer for.
    """

    images_NCHW: Tensor
    count: int
    column_NCHW: Tensor | None = None
    labels_N: Tensor | None = None
    mask_N: Tensor | None = None
    ids_N: Tensor | None = None
    """Which samples of a set these are."""
    slots_N: Tensor | None = None
    """Their places in the global batch."""
    at: tuple[int, int] = (0, 0)
    """Round and student step: keys of what is drawn at random for this batch."""
    views: int = 1
    """`images_NCHW` holds so many versions of the same samples, one after another; `count` counts samples."""
    block: int | None = None
    """Length of each rank's block in `column_NCHW` where every rank brought images of its own; null: they are dealt."""
    said: tuple[Signals, ...] = ()
    """Every teacher's answer about these images, where it is known already; then nobody is asked."""
    sections: tuple[Batch, ...] = ()
    """Parts from different sources, one after another in `images_NCHW`, each answered as it came."""

    @staticmethod
    def joined(first: Batch, second: Batch) -> Batch:
        """One batch of two; labels and ids are dropped, since the parts need not both have them."""
        images_NCHW = torch.cat([first.images_NCHW, second.images_NCHW])
        slots_N = None
        if first.slots_N is not None and second.slots_N is not None:
            slots_N = torch.cat([first.slots_N, first.count + second.slots_N])
        return Batch(images_NCHW, first.count + second.count, slots_N=slots_N, at=first.at, sections=(first, second))
