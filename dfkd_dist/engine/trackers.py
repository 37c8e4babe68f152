"""What is written while a run goes on: `metrics.jsonl`, TensorBoard, and one line of progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS, BOARD = "metrics.jsonl", "tensorboard"

QUIET_PERCENT = 10
"""Where stderr is no terminal, one line every so many percent of the rounds."""
REDRAW_SECONDS = 0.2
WINDOW = 32
"""Calls of `progress` over which speed is measured: warm-up rounds are faster than main rounds."""


class MetricsError(ValueError):
    """`metrics.jsonl` is damaged other than in a last line that was cut off."""


class Tracker:
    """Writes on the first rank; on the others every method does nothing.

    Args:
        folder: the run's directory.
        first: whether this is rank 0.
        total_rounds: for the time left.
        tensorboard: also write event files.
        stream: where the progress line goes.

    Raises:
        ImportError: TensorBoard is asked for and not installed (says how to install it).
    """

    def __init__(
        self,
        folder: Path,
        *,
        first: bool,
        total_rounds: int,
        tensorboard: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.path, self.first = folder / METRICS, first
        self._line = _ProgressLine(total_rounds, stream or sys.stderr)
        self._board_folder = folder / BOARD if tensorboard and first else None
        self._board: Any = None
        self._purge: int | None = None
        if self._board_folder is not None:
            _summary_writer()

    def truncate(self, round: int) -> None:
        """Forget everything after a round, and a last line that a crash cut off: what follows is written anew.

        Raises:
            MetricsError: another line is damaged.
        """
        if not self.first:
            return
        self._purge = round + 1
        if not self.path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["round"] <= round]
        aside = self.path.with_name(f".{METRICS}.{os.getpid()}.tmp")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)

    def log(self, round: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Append one line `{"round", "time", **metrics}`; numbers that are not finite become null.

        Args:
            round: rounds done.
            seconds: wall time of the run so far.
            metrics: by name.
        """
        if not self.first:
            return
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round, "time": seconds, **values}) + "\n")
        self._write_board(round, metrics)
        self._line.metrics = dict(metrics)
        self._line.show(round)

    def progress(self, round: int, images_per_second: float | None = None) -> None:
        """Renew the progress line; cheap enough for every round."""
        if self.first:
            self._line.images_per_second = images_per_second
            self._line.show(round)

    def close(self) -> None:
        """Finish the progress line and the event file."""
        if self.first:
            self._line.end()
        if self._board is not None:
            self._board.close()

    def _write_board(self, round: int, metrics: Mapping[str, float]) -> None:
        if self._board_folder is None:
            return
        if self._board is None:
            self._board = _summary_writer()(str(self._board_folder), purge_step=self._purge)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, round)
        self._board.flush()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
        MetricsError: another line is no JSON object with a `round`.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    # Whole lines end in a newline, so what follows the last one is empty or was cut off.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found = json.loads(line)
            if not isinstance(found["round"], int):
                raise TypeError(f"round is {found['round']!r}, allowed: a whole number")
        except (ValueError, TypeError, KeyError) as error:
            raise MetricsError(f"{path}, line {number}: not a JSON object with a round ({error})") from error
        yield found


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log.tensorboard: true needs TensorBoard, which is not installed: pip install 'dfkd-dist[tensorboard]'"
        ) from error
    return SummaryWriter


class _ProgressLine:
    """Redrawn in place on a terminal; elsewhere a plain line now and then, so that log files stay short."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream, self.live = max(total, 1), stream, stream.isatty()
        self.metrics: dict[str, float] = {}
        self.images_per_second: float | None = None
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._drawn_at, self._shown_percent, self._open = -math.inf, -1, False

    def show(self, round: int) -> None:
        now = time.monotonic()
        if not self._seen or self._seen[-1][1] < round:
            self._seen.append((now, round))
        if self.live:
            if now - self._drawn_at >= REDRAW_SECONDS or round >= self.total:
                width = shutil.get_terminal_size().columns - 1
                self._write("\r" + self._text(round)[:width].ljust(width))
                self._drawn_at, self._open = now, True
            return
        step = 100 * round // self.total // QUIET_PERCENT
        if step > self._shown_percent:
            self._write(self._text(round) + "\n")
            self._shown_percent = step

    def end(self) -> None:
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def _text(self, round: int) -> str:
        parts = [f"round {round}/{self.total}"]
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:,.0f} images/s")
        left = self._seconds_left(round)
        if left is not None:
            parts.append(f"{_clock(left)} left")
        # What people watch comes before what a narrow terminal may cut off.
        ranked = sorted(self.metrics, key=lambda name: (not name.startswith("student/"), name.startswith("generator/")))
        return "  ".join(parts + [f"{name} {self.metrics[name]:.4g}" for name in ranked])

    def _seconds_left(self, round: int) -> float | None:
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (end - start) / (last - first) * (self.total - round) if last > first else None


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
