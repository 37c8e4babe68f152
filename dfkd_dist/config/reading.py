"""Reading recipes: YAML with `base` and dotted overrides, and errors that name key, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from dfkd_dist.config.base import Spec
from dfkd_dist.config.schema import Recipe
from dfkd_dist.config.teachers import TeachersRecipe
from dfkd_dist.resources import configs_dir

S = TypeVar("S", bound=Spec)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every offending key."""


class _Loader(yaml.SafeLoader):
    """Safe YAML (no tags that make objects) with 1e-3 read as a number and repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, name: str) -> Any:
    """The one document in `text`; errors (yaml.YAMLError) say `name`, line and column."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def find_recipe(name: str | Path, near: Path | None = None) -> Path:
    """The file meant by `name`: as given, beside `near`, or among the recipes that ship with the package.

    Raises:
        RecipeError: no such file; names the nearest shipped recipe.
    """
    given = Path(name)
    places = [near.parent / given] if near is not None else [given]
    shipped = configs_dir()
    places += [given, shipped / given, shipped / Path(*given.parts[1:])] if given.parts else []
    for place in places:
        if place.is_file():
            return place
    # Files under `_parts` are bases, not recipes.
    known = [
        str(p.relative_to(shipped)) for p in shipped.rglob("*.yaml") if near is not None or "_parts" not in p.parts
    ]
    raise RecipeError(f"no recipe file {name}{_nearest(str(given).removeprefix('configs/'), known)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, merged over its `base`: one file, or a list of them, later ones on top.

    Raises:
        RecipeError: not YAML, not a mapping, a repeated key, or bases that form a circle.
    """
    return _read_with_bases(path, ())


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in above:
        raise RecipeError(f"{path}: `base` leads in a circle: {' -> '.join(str(p) for p in (*above, here))}")
    layer = _read_one(path)
    merged: dict[str, Any] = {}
    for base in _bases(path, layer):
        merged = _merge(merged, _read_with_bases(find_recipe(base, near=path), (*above, here)))
    return _merge(merged, layer)


def _bases(path: Path, layer: dict[str, Any]) -> list[str]:
    """Takes `base` out of a file's mapping."""
    given = layer.pop("base", [])
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: base: expected a file name or a list of them (given: {given!r})")
    return bases


def _read_one(path: Path) -> dict[str, Any]:
    try:
        content = _parse_yaml(path.read_text(), path.name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`; mappings merge (unless both say a `kind` and these differ), all else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and _same_kind(below, value):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _same_kind(below: dict[str, Any], value: dict[str, Any]) -> bool:
    return "kind" not in below or "kind" not in value or below["kind"] == value["kind"]


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in place; the value is read as YAML, list items by their number.

    Raises:
        RecipeError: no `=`, a bad list index, or a key below a value that has none.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value, for example student.arch=resnet34")
    try:
        value = _parse_yaml(text, key)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
            if not isinstance(node, dict | list):
                raise RecipeError(f"override {override!r}: {part!r} is the value {node!r}; nothing stands below it")
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"override {override!r}: {part!r} must be a number from 0 to {len(items) - 1}")
    return int(part)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Raises:
        RecipeError: lists every offending key with what was given and what is allowed.
    """
    return _load(Recipe, path, overrides)


def load_teachers_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TeachersRecipe:
    """Read, override and check a recipe for private teachers.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _load(TeachersRecipe, path, overrides)


def _load(kind: type[S], path: str | Path, overrides: Sequence[str]) -> S:
    file = find_recipe(path)
    tree = read_yaml(file)
    for override in overrides:
        apply_override(tree, override)
    return parse(kind, tree, where=str(file))


def parse(kind: type[S], tree: dict[str, Any], where: str = "recipe") -> S:
    """Check a mapping against a schema.

    Raises:
        RecipeError: lists every offending key with what was given and what is allowed.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, dict(detail)) for detail in error.errors()]
        raise RecipeError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def dump(spec: Spec) -> str:
    """The resolved recipe as YAML; reading it back gives an equal recipe."""
    return yaml.safe_dump(spec.model_dump(), sort_keys=False, width=120)


def _explain(kind: type[Spec], detail: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, what is allowed."""
    location = [str(p) for p in detail["loc"]]
    parts, models = _untagged(kind, location)
    key, given = ".".join(parts) or "(whole recipe)", detail["input"]
    message = str(detail["msg"]).removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            allowed = sorted({key for model in models for key in model.model_fields})
            return f"{key}: unknown key (given: {given!r}){_nearest(parts[-1], allowed)}; allowed: {', '.join(allowed)}"
        case "missing":
            return f"{key}: required, but not given"
        case "union_tag_not_found":
            return f"{key}.kind: required, but not given; allowed: {', '.join(_kinds(models, parts[-1]))}"
        case "union_tag_invalid":
            kinds = _kinds(models, parts[-1])
            tag = str(given.get("kind"))
            return f"{key}.kind: unknown kind (given: {tag!r}){_nearest(tag, kinds)}; allowed: {', '.join(kinds)}"
        case "value_error":
            return f"{key}: {message}"
        case _:
            shown = repr(given) if len(repr(given)) < 120 else type(given).__name__
            return f"{key}: {message} (given: {shown}){_nearest_choice(given, message)}"


def _untagged(kind: type[Spec], location: list[str]) -> tuple[list[str], list[type[Spec]]]:
    """The keys of the file that lead to a place of pydantic's, and the models that the last of them may belong to.

    Where several kinds of a section are allowed, the value of `kind` stands in pydantic's location but is no key.
    """
    parts: list[str] = []
    models, inside = [kind], [kind]
    for part in location:
        chosen = [model for model in inside if len(inside) > 1 and _tag(model) == part]
        if chosen:
            inside = chosen
            continue
        parts.append(part)
        if part.isdigit():
            continue
        models = inside
        found = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        inside = [inner for annotation in found for inner in _models_in(annotation)]
    return parts, models


def _tag(model: type[Spec]) -> str | None:
    """The value of `kind` that stands for a model."""
    field = model.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def _kinds(models: Sequence[type[Spec]], part: str) -> list[str]:
    """The values that `kind` may have in a section of some models."""
    sections = [model.model_fields[part].annotation for model in models if part in model.model_fields]
    return [str(_tag(inner)) for annotation in sections for inner in _models_in(annotation)]


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models_in(inner)]


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nearest_choice(given: Any, message: str) -> str:
    return _nearest(given, re.findall(r"'([^']+)'", message)) if isinstance(given, str) else ""
