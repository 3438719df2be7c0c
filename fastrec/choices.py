"""Literal annotations of dataclasses, checked where an object is made."""

from typing import Literal, get_args, get_origin, get_type_hints


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
