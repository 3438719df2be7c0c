# SPDX-License-Identifier: Apache-2.0
"""What the dataclasses of a recipe share: a field that is one of a few words, a section that names
one part of several, and how they are read from YAML."""

import dataclasses
import math
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}


def check_fields(config) -> None:
    """Raise ValueError for a field that is annotated Literal[...], int or float, or None beside
    one of them, or a list of one of them, and holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        given, origin = getattr(config, name), get_origin(hint)
        parts = get_args(hint) if origin in (list, Union, UnionType) else (hint,)
        kinds = [part for part in parts if part is not type(None)]
        if origin is list and not isinstance(given, list | tuple):
            raise ValueError(f"{name} must be a list, got {given!r:.60}")
        for value in given if origin is list else [given]:
            if value is None and len(kinds) < len(parts):
                continue
            if all(get_origin(kind) is Literal for kind in kinds):
                allowed = [word for kind in kinds for word in get_args(kind)]
                if value not in allowed:
                    raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
            elif len(kinds) == 1 and kinds[0] in _NUMBERS:
                right = isinstance(value, _NUMBERS[kinds[0]]) and not isinstance(value, bool)
                if not right:
                    raise ValueError(f"{name} must be {_words(kinds[0])}, got {value!r:.60}")


def check_pair(name: str, views: list[str]) -> None:
    """Raise ValueError unless an objective names two views."""
    if len(views) != 2 or views[0] == views[1]:
        raise ValueError(f"{name} compares two views, got {views}")


def check_one(name: str, views: list[str]) -> None:
    """Raise ValueError unless an objective names one view."""
    if len(views) != 1:
        raise ValueError(f"{name} reads one view, got {views}")


def part_of(section) -> Any:
    """The one field of a section that is set, like `crop` of a step. Raises ValueError for none or
    several."""
    names = [field.name for field in dataclasses.fields(section)]
    chosen = [name for name in names if getattr(section, name) is not None]
    if len(chosen) != 1:
        what = "names none" if not chosen else "names " + " and ".join(chosen)
        raise ValueError(f"{type(section).__name__.lower()} {what}: one of {names} is expected")
    return getattr(section, chosen[0])


def from_values(hint: Any, value: Any, path: str = "") -> Any:
    """What a type hint says, from the plain values of YAML: dataclasses from mappings, lists,
    numbers, words. null is the default of a field, and takes an entry out of a mapping.

    Raises ValueError that names the key: unknown, missing, of another type, or refused by its
    class.
    """
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, path)
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return _one_of(inner, value, path)
    if kind is Literal:
        if any(value == word and type(value) is type(word) for word in inner):
            return value
    elif kind is dict and isinstance(value, dict):
        kept = {name: part for name, part in value.items() if part is not None}
        return {name: from_values(inner[1], part, f"{path}.{name}") for name, part in kept.items()}
    elif kind is list and isinstance(value, list):
        return [from_values(inner[0], part, f"{path}.{i}") for i, part in enumerate(value)]
    elif kind is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        pairs = zip(inner, value, strict=True)
        return tuple(from_values(part, each, f"{path}.{i}") for i, (part, each) in enumerate(pairs))
    elif hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # also of a word: for YAML 1e-4 is one
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint and (hint is not int or -(2**63) <= value < 2**63):
        return value
    words = _words(hint)
    if hint is int and type(value) is int:
        words += " of 64 bits"
    raise ValueError(f"{path} is {_short(value)}, expected {words}")


def _short(value: Any) -> str:
    """A value of a file may be as long as the file."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} .. {text[-100:]}"


def _section(kind, value: Any, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is {_short(value)}, expected a group of keys: {', '.join(fields)}"
        )
    hints, chosen = get_type_hints(kind), {}
    for name, part in value.items():
        where = f"{path}.{name}".lstrip(".")
        if name not in fields:
            raise ValueError(f"{where} is no key; {path or 'a recipe'} has {', '.join(fields)}")
        if part is not None or type(None) in get_args(hints[name]):
            chosen[name] = from_values(hints[name], part, where)
    for name, field in fields.items():
        default = field.default, field.default_factory
        if name not in chosen and default == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"{path}.{name} is missing")
    try:
        return kind(**chosen)
    except ValueError as error:
        raise ValueError(_placed(str(error), path, fields)) from error


def _placed(message: str, path: str, fields) -> str:
    """The message of a class with the path of its section: "share must be .." and "mask.share must
    be .." of pretraining.views.main.0.mask both begin with it."""
    outer, _, own = path.rpartition(".")
    if message.startswith(f"{own}."):
        return f"{outer}.{message}".lstrip(".")
    first = message.replace(":", " ").split(" ")[0]
    return f"{path}.{message}" if path and first in fields else f"{path}: {message}".lstrip(": ")


def _one_of(hints: tuple, value: Any, path: str) -> Any:
    rest = [hint for hint in hints if hint is not type(None)]
    if value is None and len(rest) < len(hints):
        return None
    sections = [hint for hint in rest if dataclasses.is_dataclass(hint)]
    if isinstance(value, dict) and len(sections) == 1:  # for its error, which names the key
        rest = sections
    if len(rest) == 1:
        return from_values(rest[0], value, path)
    for hint in rest:
        try:
            return from_values(hint, value, path)
        except ValueError:
            continue
    raise ValueError(f"{path} is {_short(value)}, expected {' or '.join(map(_words, rest))}")


def _words(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a group of keys: " + ", ".join(field.name for field in dataclasses.fields(hint))
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(repr, inner))
    if kind is dict:
        return "a mapping"
    if kind is tuple:
        return f"a list of {len(inner)}"
    plain = {list: "a list", bool: "true or false", int: "a whole number", float: "a number"}
    return plain.get(kind or hint, "a word")
