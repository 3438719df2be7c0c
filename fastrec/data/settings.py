"""What the dataclasses of a recipe share: a field that is one of a few words, and a section that
names one part of several."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config) -> None:
    """Raise ValueError for a field annotated Literal[...] (or None) that holds something else."""
    for name, hint in get_type_hints(type(config)).items():
        parts = [hint] if get_origin(hint) is Literal else list(get_args(hint))
        allowed = [value for part in parts for value in get_args(part)]
        if any(get_origin(part) is not Literal and part is not type(None) for part in parts):
            continue
        value = getattr(config, name)
        if parts and value not in allowed and not (value is None and type(None) in parts):
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def part_of(section) -> Any:
    """The one field of a section that is set, like `crop` of a step. Raises ValueError for none or
    several."""
    names = [field.name for field in dataclasses.fields(section)]
    chosen = [name for name in names if getattr(section, name) is not None]
    if len(chosen) != 1:
        what = "names none" if not chosen else "names " + " and ".join(chosen)
        raise ValueError(f"{type(section).__name__.lower()} {what}: one of {names} is expected")
    return getattr(section, chosen[0])
