"""Recipes from files and back: shipped ones, YAML, run folders; bases and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from arae.config.document import PartType, checked, flatten, in_full, merged, parse_override, set_key
from arae.config.schema import Recipe
from arae.errors import InputError

RESOLVED = "recipe.yaml"  # a run folder's recipe


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with arae, by name."""
    folder = Path(str(resources.files("arae") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by shipped name, YAML file, or run folder, with `dotted.key=value` overrides.

    A file may name a `base`: it then holds only what differs. Lists are replaced, not merged.
    Raises InputError: no such recipe, unreadable YAML, unknown key (with the nearest valid one), bad value.
    """
    path = _recipe_path(str(name_or_path))
    document = _document(path)
    pairs = [parse_override(text) for text in overrides]
    if any(key == "base" for key, _ in pairs):
        raise InputError(
            "override base=…: a base belongs in a recipe's file; to start from another recipe, name that one"
        )
    if document.get("base") is None and path.name != RESOLVED:
        document["base"] = str(name_or_path)  # what overrides, and a demo's radii, are a difference from
    for key, value in pairs:
        set_key(document, key, value)
    return checked(Recipe, document, where=str(name_or_path))


def load_options(model: type[PartType], overrides: Iterable[str], where: str) -> PartType:
    """Any part of the schema from bare `key=value` overrides alone; InputError as for a recipe."""
    document: dict[str, Any] = {}
    for text in overrides:
        set_key(document, *parse_override(text))
    return checked(model, document, where)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def difference(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys whose values differ from the recipe's base (from the schema's defaults where there is no base)."""
    try:
        base = flatten(load_recipe(recipe.base).model_dump(mode="json")) if recipe.base else {}
    except InputError:
        base = {}
    mine = flatten(recipe.model_dump(mode="json"))
    return {k: v for k, v in mine.items() if k not in ("name", "base") and (not base or base.get(k) != v)}


def _recipe_path(name: str, beside: Path = Path()) -> Path:
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = beside / name
    if not path.exists():  # it may be a run at a URL
        from arae.storage import fetched, is_url

        path = fetched(name if is_url(name) else path)
    if path.is_dir() and (path / RESOLVED).is_file():
        return path / RESOLVED
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(shipped)}"
    raise InputError(f"no recipe {name!r}: neither a shipped recipe, a YAML file nor a run folder; {hint}")


def _document(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: its base leads back to itself ({' -> '.join(each.name for each in seen)})")
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys, not {type(document).__name__}")
    document = in_full(document)
    base = document.get("base")
    if base is None or (path.name == RESOLVED and "encoder" in document and "data" in document):
        return document  # a run folder's recipe is whole already; its base only names where it came from
    parent = _recipe_path(str(base), beside=path.parent)
    found_by = str(base) if str(base) in shipped_recipes() else str(parent)
    return merged(_document(parent, (*seen, path.resolve())), document) | {"base": found_by}
