"""What every part of a recipe is made of: the strict base class, and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Base of all recipe parts: frozen, strict about types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _rest_of_a_section_is_its_default(cls, given: Any) -> Any:
        """`optimizer: {lr: 0.1}` keeps the other keys of that optimiser's default, unless its `kind` changes."""
        if not isinstance(given, dict):
            return given
        return {
            key: _over(cls.model_fields[key].default, v) if key in cls.model_fields else v for key, v in given.items()
        }


def _over(default: Any, given: Any) -> Any:
    if not (isinstance(default, Spec) and isinstance(given, dict)):
        return given
    under = default.model_dump()
    return {**under, **given} if given.get("kind", under.get("kind")) == under.get("kind") else given


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Channels = Literal[1, 3]


def _fillable(out: str) -> str:
    try:
        out.format(name="", seed=0)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{out!r} cannot be filled in ({error}); allowed: {{name}} and {{seed}}") from None
    return out


OutDir = Annotated[str, AfterValidator(_fillable)]
"""A directory in which {name} and {seed} are filled in."""
