"""Draws generated_digits.png from the grids of a finished quick start.

    .venv/bin/python docs/images/make_generated_digits.py [RUN]

What each teacher's generator made at the left, real test digits at the right. Enlarged without smoothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image, write_png

BLOCK, GAP, HEIGHT, SCALE = 146, 12, 74, 3
"""Of a grid: width of its generated part, of the white before the real part, height shown; and the enlargement."""


def main() -> None:
    """Put the blocks side by side and write the picture beside this file."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    files = sorted((run / "grids" / "end").glob("*.png"))
    if not files:
        sys.exit(f"{run}: no pictures in grids/end; run `make quickstart` first")
    grids = [decode_image(str(file), ImageReadMode.GRAY)[:, :HEIGHT] for file in files]
    generated = [grid[:, :, : BLOCK + GAP] for grid in grids]
    small = torch.cat([*generated, grids[0][:, :, -BLOCK:]], dim=2)
    large = small.repeat_interleave(SCALE, dim=1).repeat_interleave(SCALE, dim=2)
    out = Path(__file__).with_name("generated_digits.png")
    write_png(large, str(out), compression_level=9)
    print(f"{out}: {large.shape[2]} x {large.shape[1]} pixels, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
