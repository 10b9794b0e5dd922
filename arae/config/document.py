"""Nested documents and their dotted keys: one grammar for YAML files, command lines, sweeps and MLflow's parameters."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from arae.errors import InputError

PartType = TypeVar("PartType", bound=BaseModel)


def digest_of(document: object) -> str:
    """SHA-256 (hex) of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in models_in(field.annotation):
            yield from keys(part, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The parts of the schema inside a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `top` says instead; mappings are merged key by key, lists are replaced."""
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def parse_override(text: str) -> tuple[str, Any]:
    """`dotted.key=value` as key and YAML value; InputError where it is not of that form."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"override {text!r}: write dotted.key=value, such as encoder.attack.eps=1.5")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return key, value


SHORT = {"engine": "kind"}
"""Groups that one word may stand for (`engine: deepspeed`), and the key of theirs that it sets."""


def in_full(document: dict[str, Any]) -> dict[str, Any]:
    """The document with such words written out, so that other keys of their groups can stand beside them."""
    short = {name: {SHORT[name]: document[name]} for name in SHORT if isinstance(document.get(name), str)}
    return document | short


def set_key(document: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in place, making groups on the way; InputError where a value stands in it."""
    if dotted in SHORT and isinstance(value, str):
        dotted = f"{dotted}.{SHORT[dotted]}"
    *parents, last = dotted.split(".")
    node: Any = document
    for i, name in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, name, dotted)
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise InputError(f"override {dotted}={value}: {'.'.join(parents[: i + 1])} is a value, not a group of keys")
    if isinstance(node, list):
        _item(node, last, dotted)
        node[int(last)] = value
    else:
        node[last] = value


def _item(items: list[Any], name: str, dotted: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise InputError(f"override {dotted}: {name!r} is not one of the {len(items)} items, counted from 0")
    return items[int(name)]


def checked(model: type[PartType], document: dict[str, Any], where: str) -> PartType:
    """The document as a model; InputError names each key that is wrong and, for an unknown one, the nearest."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {'; '.join(_explain(dict(e), model) for e in error.errors())}") from None


def _nearest_key(place: str, model: type[BaseModel]) -> str | None:
    parts = place.split(".")
    near = difflib.get_close_matches(".".join(p for p in parts if not p.isdigit()), list(keys(model)), n=1, cutoff=0.5)
    if not near:
        return None
    key = near[0].split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and key[:i] == parts[:i]:  # the schema's keys have no item numbers: put them back
            key.insert(i, part)
    return ".".join(key)


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest_key(place, model)
        return f"unknown key {place}" + (
            f"; did you mean {near}?" if near else f"; there are {', '.join(model.model_fields)}"
        )
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = (
        f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and repr(value) not in message else ""
    )
    return f"{place}: {message}{shown}" if place else message
