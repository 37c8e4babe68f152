"""From an objective's section of a recipe to the object: one line for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dfkd_dist.config import AnyObjectiveSpec, KD3Spec, NoisySpec, ObjectiveSpec, SSKDSpec
from dfkd_dist.models.signals import Need
from dfkd_dist.objectives import distillation, kd3, noisy, sskd
from dfkd_dist.objectives.base import Objective
from dfkd_dist.objectives.context import Context, Needs, Shapes
from dfkd_dist.objectives.distillation import Distillation
from dfkd_dist.objectives.kd3 import KD3
from dfkd_dist.objectives.noisy import Noisy
from dfkd_dist.objectives.sskd import SSKD

__all__ = ["Context", "Needs", "Shapes", "make_objective", "needed", "needs"]


@dataclass(frozen=True)
class _Kind:
    make: Callable[[Any, Context], Objective]
    needs: Callable[[Any], Needs]


_KINDS: dict[type, _Kind] = {
    ObjectiveSpec: _Kind(Distillation, distillation.needs),
    NoisySpec: _Kind(Noisy, noisy.needs),
    SSKDSpec: _Kind(SSKD, sskd.needs),
    KD3Spec: _Kind(KD3, lambda spec: Needs(kd3.needed(spec), kd3.needed(spec))),
}


def needs(spec: AnyObjectiveSpec) -> Needs:
    """Signals that an objective wants from every teacher, and from the student."""
    return _KINDS[type(spec)].needs(spec)


def needed(spec: AnyObjectiveSpec) -> Need:
    """Signals that an objective wants from every teacher."""
    return needs(spec).teacher


def make_objective(spec: AnyObjectiveSpec, context: Context) -> Objective:
    """The objective of a section; a module, whose heads train with the student.

    Raises:
        ValueError: a network lacks a signal that a term compares, or the source is none that a term can use.
    """
    return _KINDS[type(spec)].make(spec, context)
