"""Argument checks shared by the loss modules: shapes, temperatures and names, with messages that help."""

import difflib
import math
from collections.abc import Iterable, Sequence

from torch import Tensor


def unknown_name(key: str, found: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: what was found, what is nearest, what is allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return ValueError(f"{key}: unknown name {found!r}{hint}; allowed: {', '.join(names) or '(none)'}")


def one_of(key: str, found: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``found`` is one of ``allowed``."""
    if found not in allowed:
        raise unknown_name(key, found, allowed)


def dims(key: str, tensor: Tensor, count: int) -> None:
    """Raise ValueError unless ``tensor`` has ``count`` dimensions."""
    if tensor.dim() != count:
        raise ValueError(f"{key}: expected {count} dimension(s), found shape {tuple(tensor.shape)}")


def class_scores(key: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is ``[N, C]`` or ``[N, C, *positions]``."""
    if tensor.dim() < 2:
        raise ValueError(f"{key}: expected [N, C] or [N, C, *positions], found shape {tuple(tensor.shape)}")


def same_shape(key_a: str, a: Tensor, key_b: str, b: Tensor) -> None:
    """Raise ValueError unless shapes agree: broadcasting would turn a wrong shape into a wrong number."""
    if a.shape != b.shape:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{key_a} and {key_b} must have one shape, found {found}")


def positive_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number > 0, found {temperature!r}")
