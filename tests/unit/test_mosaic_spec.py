"""MosaicKD's section of a recipe: its defaults are the method, and what contradicts itself is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dfkd_dist.config import MosaicSpec

Tree = dict[str, Any]
READER = {"shards": "somewhere"}


def test_the_defaults_are_the_method() -> None:
    spec = MosaicSpec(kind="mosaic", reader=READER)  # type: ignore[arg-type]
    assert spec.loss.weights() == {
        "patch": 1.0, "ice": 1.0, "adv": 1.0, "bce": 14.427, "bn": 0.0, "oh": 0.0, "act": 0.0,
    }  # fmt: skip
    assert spec.loss.bce * np.log(2) == pytest.approx(10, abs=1e-3)  # 10 with log2
    assert (spec.adversary.against, spec.adversary.temperature) == ("student", 1.0)
    judge = spec.discriminator
    assert judge is not None and (judge.field, judge.stride, judge.form) == (8, 1, "non_saturating")
    assert (judge.optimizer.kind, judge.optimizer.lr, judge.optimizer.betas) == ("adam", 1e-3, [0.5, 0.999])
    assert spec.ood_batch == 0


WRONG: list[tuple[Tree, str]] = [
    ({"discriminator": None, "reader": None}, r"loss.patch is 1.0 but discriminator is null; give one, or set"),
    ({"loss": {"patch": 0.0}}, r"loss.patch is 0, so nothing listens to the discriminator; set discriminator: null"),
    ({"reader": None}, r"discriminator needs real images; give source.reader the shards they come from"),
    (
        {"discriminator": None, "loss": {"patch": 0.0}, "reader": None, "ood_batch": 7},
        r"ood_batch: 7 needs real images; give source.reader",
    ),
    (
        {"discriminator": None, "loss": {"patch": 0.0}, "ood_batch": 0},
        r"reader is given, but discriminator is null and ood_batch is 0, so nothing would be read",
    ),
    (
        {"discriminator": None, "loss": {"patch": 0.0}, "reader": None, "selection": {"kind": "top", "count": 5}},
        r"selection chooses among the images of `reader`, which is not given",
    ),
    ({"selection": {"kind": "kd3"}}, r"selection.kind is kd3.*allowed here: manifest, top, random"),
    ({"discriminator": {"field": 9}}, r"discriminator.field"),
    ({"discriminator": {"stride": 0}}, r"discriminator.stride"),
    ({"loss": {"adv": 0.0}}, r"adversary.against is student but loss.adv is 0"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_recipe_that_contradicts_itself_is_refused(changes: Tree, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MosaicSpec.model_validate({"kind": "mosaic", "reader": READER} | changes)
