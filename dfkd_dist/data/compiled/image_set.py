"""A compiled file as a labelled image set: `kind: ffcv` of a dataset."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.compiled.about import Compiled, read_compiled
from dfkd_dist.data.compiled.extra import need_ffcv
from dfkd_dist.data.compiled.read import CompiledReader
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.image_set import ImageSet
from dfkd_dist.data.part import Part, Split

_ALONE = "test"
"""What a file is that was compiled from shards, which know no splits."""


class CompiledImageSet(ImageSet):
    """Images read from the file each time they are asked for.

    Args:
        compiled: the file.
        ids_n: int64, which of its images, by their ids.
    """

    def __init__(self, compiled: Compiled, ids_n: Tensor) -> None:
        manifest, about = compiled.manifest, compiled.about
        labels_n = torch.from_numpy(manifest.labels_N)[ids_n]
        super().__init__(labels_n, about.classes or [], size=about.size, channels=about.channels)
        ids = ids_n.numpy()
        self._pieces_3n = np.stack([np.zeros_like(ids), manifest.offsets_N[ids], manifest.sizes_N[ids]])
        self._reader = CompiledReader(compiled)

    def images(self, indices: Tensor) -> Tensor:
        """See ImageSet."""
        return self._reader.read(self._pieces_3n[:, indices.numpy()]).images_NCHW.contiguous()


def read_compiled_set(spec: DatasetSpec, split: Split) -> Part:
    """The images of a compiled file, which is one split as a whole; those that could not be decoded are left out.

    Raises:
        DatasetError: see `read_compiled`; another split, size or number of channels; an image without a label.
        ImportError: FFCV is missing; says how to get it.
    """
    compiled = read_compiled(str(spec.path))
    compiled.check(spec.size, spec.channels)
    found = compiled.about.split or _ALONE
    if split != found:
        raise DatasetError(f"{spec.path}: split: found {split!r}, but the file was compiled from {found!r} alone")
    labels_n = torch.from_numpy(compiled.manifest.labels_N[compiled.held()])
    if len(labels_n) and int(labels_n.min()) < 0:
        raise DatasetError(f"{spec.path}: holds images without a label; a labelled image set needs one for each")
    need_ffcv("kind: ffcv")
    ids_n = torch.from_numpy(compiled.held())

    def make(positions: Tensor) -> CompiledImageSet:
        return CompiledImageSet(compiled, ids_n[positions])

    return Part(torch.arange(len(ids_n)), labels_n, compiled.about.classes or [], make, carve=False)
