"""A student that takes over its teacher's classifier, where its objective says so (KD3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dfkd_dist.config import KD3Spec, Spec
from dfkd_dist.models.cards import Card
from dfkd_dist.models.network import ImageNetwork
from dfkd_dist.models.shared_classifier import classifier, last_linear, projected_width, share_classifier
from dfkd_dist.models.teacher import Teacher


def fitted_card(objective: Spec, card: Card, teachers: Sequence[Teacher]) -> Card:
    """The student's card: with a projector where its objective needs features as wide as the teacher's.

    Raises:
        ValueError: the student or the teacher has no linear classifier.
    """
    if not (isinstance(objective, KD3Spec) and objective.equal_features):
        return card
    with torch.device("meta"):
        own = last_linear(card.build(), torch.zeros(2, card.channels, card.size, card.size))
    return replace(card, features=projected_width(own, classifier(teachers[0])))


def take_classifier(objective: Spec, student: ImageNetwork, teachers: Sequence[Teacher]) -> None:
    """Copy the teacher's classifier into the student and freeze it, where the objective shares it.

    Raises:
        ValueError: see `share_classifier`.
    """
    if isinstance(objective, KD3Spec) and objective.shares_classifier:
        share_classifier(student, teachers[0])
