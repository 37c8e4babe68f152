"""The student in a program of one's own: load it, show it a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

import dfkd_dist

STUDENT = Path("runs/own-student/student.safetensors")
HELDOUT = Path("runs/own-teachers/heldout.npz")
COUNT = 10


def main() -> None:
    """Print what the student says about the first test digits, and how sure it is."""
    student = dfkd_dist.load_student(STUDENT)
    classes = json.loads(STUDENT.with_suffix(".json").read_text())["classes"]
    heldout = np.load(HELDOUT)
    images = torch.from_numpy(heldout["test_x"][:COUNT]).float()[:, None] / 255  # [N, 1, 16, 16] in [0, 1]
    with torch.no_grad():
        probabilities = student(images).logits_NC.softmax(dim=1)
    for digit, p in zip(heldout["test_y"][:COUNT].tolist(), probabilities, strict=True):
        print(f"digit {digit}: student says {classes[int(p.argmax())]} ({100 * float(p.max()):.0f} % sure)")


if __name__ == "__main__":
    main()
