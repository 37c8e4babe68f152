"""Readers that reading processes are given in the place of a real one. Imports little: each process imports it anew."""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Outcome
from dfkd_dist.data.stream.reading import ImageReader


class Failing(ImageReader):
    """Fails in a way that is no sample's fault."""

    def read(self, pieces_3N: NDArray[np.int64], out_NCHW: Tensor | None = None) -> Outcome:
        raise DatasetError("the disk is full")


class Stuck(ImageReader):
    """Never comes back; makes the file `begun` first."""

    begun: Path

    def read(self, pieces_3N: NDArray[np.int64], out_NCHW: Tensor | None = None) -> Outcome:
        self.begun.touch()
        time.sleep(1000)
        raise AssertionError
