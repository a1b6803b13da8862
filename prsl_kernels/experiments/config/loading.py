"""Recipes as files: hostile input, read with YAML's safe loader."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from prsl_kernels.experiments.config.recipe import Recipe
from prsl_kernels.experiments.errors import UserError


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON types, defaults included: what is saved and hashed."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("prsl_kernels.experiments") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe by its shipped name or its path, and applies overrides such as "tasks.vqa.attack.eps=4".

    Raises:
        UserError: no such recipe, not YAML, an unknown key, or a value out of range; the message names the key.
    """
    if name_or_path in recipe_names():
        source = Path(str(resources.files("prsl_kernels.experiments") / "recipes" / f"{name_or_path}.yaml"))
    else:
        source = Path(name_or_path)
    try:
        raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"recipe {name_or_path!r}: neither a file nor one of the shipped recipes ({', '.join(recipe_names())})"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"recipe {source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {source}: expected a mapping at the top, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_python(raw)
        return _with_sweep(recipe)
    except ValidationError as error:
        raise UserError(f"recipe {source}: " + _explain(error)) from None


def _with_sweep(recipe: Recipe) -> Recipe:
    """With the sweep's arms behind the recipe's own; a saved recipe has them already."""
    if recipe.sweep is None:
        return recipe
    known = {arm.name for arm in recipe.arms}
    return replace(recipe, arms=(*recipe.arms, *(arm for arm in recipe.sweep.arms if arm.name not in known)))


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected KEY=VALUE, such as tasks.vqa.attack.eps=4")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part, key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} is not a mapping")


def _descend(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if isinstance(node, dict) and part in node:
        if node[part] is None:
            node[part] = {}
        return node[part]
    raise UserError(f"override {key!r}: the recipe has no {part!r} there")


def _index(node: list[Any], part: str, key: str) -> int:
    """A list of named things (the arms) is indexed by name as well as by number."""
    for position, item in enumerate(node):
        if isinstance(item, dict) and item.get("name") == part:
            return position
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise UserError(f"override {key!r}: the list has no entry {part!r}")


def _explain(error: ValidationError) -> str:
    """Every complaint on a line of its own, with the key's path; remedies for the commonest."""
    lines = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = "unknown key; remove it or correct its spelling"
        elif item["type"] in ("missing", "missing_argument"):
            message = "required key is missing"
        elif item["type"] != "value_error":
            message += f" (found {item['input']!r:.80})"
        lines.append(f"{place}: {message}")
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text; `load_recipe` reads it back to an equal value."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
