"""Draws generated_digits.png from the grids of a finished quick start.

    .venv/bin/python docs/images/make_generated_digits.py [RUN]

One band for each teacher: what its generator made at the left, real test digits at the right. Enlarged without smoothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, write_png

ROWS, CELL, EDGE, SCALE = 4, 18, 2, 3
"""Rows of digits shown of each grid; a digit with its margin, and the outer margin, in pixels; enlargement."""


def band(path: Path) -> Tensor:
    """The upper rows of one grid, `[1, height, width]`."""
    return decode_image(str(path), ImageReadMode.GRAY)[:, : ROWS * CELL + EDGE]


def main() -> None:
    """Stack the bands and write the picture beside this file."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    bands = [band(path) for path in sorted((run / "grids" / "end").glob("*.png"))]
    if not bands:
        sys.exit(f"{run}: no pictures in grids/end; run `make quickstart` first")
    gap = torch.full((1, 8, bands[0].shape[2]), 255, dtype=torch.uint8)
    parts = [part for one in bands for part in (one, gap)][:-1]
    small = torch.cat(parts, dim=1)
    large = small.repeat_interleave(SCALE, dim=1).repeat_interleave(SCALE, dim=2)
    out = Path(__file__).with_name("generated_digits.png")
    write_png(large, str(out), compression_level=9)
    print(f"{out}: {large.shape[2]} x {large.shape[1]} pixels, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
