"""Compiled files written without FFCV, byte by byte, for tests of what is done with them before a pixel is read."""

from pathlib import Path
from typing import Any

import numpy as np

from dfkd_dist.data.compiled import beton
from dfkd_dist.data.compiled.about import About, about_path

SIDE = 4


def write_beton(path: Path, ids: list[int], labels: list[int], **changes: Any) -> Path:
    """A raw file of random 4 px images of a set of two shards of 6 samples, and its JSON; `changes` are the JSON's."""
    n, raw = len(ids), 3 * SIDE * SIDE
    fields = np.zeros(3, beton._FIELD)
    for row, (kind, name) in enumerate(zip((2, 1, 1), beton.FIELDS, strict=True)):
        fields[row]["kind"] = kind
        fields[row]["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    start = beton._HEADER.itemsize + fields.nbytes + n * beton.SAMPLE.itemsize
    places = start + raw * np.arange(n)
    samples = np.zeros(n, beton.SAMPLE)
    samples["image"]["mode"], samples["image"]["place"] = 1, places
    samples["image"]["width"] = samples["image"]["height"] = SIDE
    samples["label"], samples["id"] = labels, ids
    pieces = np.zeros(n, beton._PIECE)
    pieces["sample"], pieces["place"], pieces["size"] = np.arange(n), places, raw
    header = np.zeros(1, beton._HEADER)
    header["version"], header["fields"], header["page"] = 2, 3, 2**21
    header["samples"], header["table"] = n, start + raw * n
    pixels = np.random.default_rng(0).integers(0, 256, raw * n, dtype=np.uint8)
    parts = (header, fields, samples, pixels, pieces[::-1])  # FFCV does not promise an order of the last
    path.write_bytes(b"".join(part.tobytes() for part in parts))
    facts: dict[str, Any] = {
        "source": "set/manifest.json",
        "set": "the digest",
        "selection": None,
        "samples": 12,
        "count": n,
        "size": SIDE,
        "channels": 3,
        "mode": "raw",
        "split": None,
        "bytes": path.stat().st_size,
        "sha256": "",
        "classes": ["a", "b", "c"],
        "shards": [("000000.tar", 6), ("000001.tar", 6)],
        "bad": [],
    }
    about_path(path).write_text(About(**facts | changes).text())
    return path
