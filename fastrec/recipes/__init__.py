# SPDX-License-Identifier: Apache-2.0
"""Recipes: one named composition per system. `load("uprec-mip")` is its YAML, bases included."""

import math
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MOST_VALUES = 20_000  # of a recipe or a flag


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name_or_file: str) -> Path:
    """The YAML file of a recipe name, or the file itself.

    Raises FileNotFoundError that lists the recipes.
    """
    for candidate in (Path(name_or_file), FOLDER / f"{name_or_file}.yaml"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{name_or_file!r} is neither a file nor a recipe; the recipes are {', '.join(names())}"
    )


def summary(name: str) -> str:
    """The first sentence of a recipe's comment."""
    text = []
    for line in path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text.append(line.removeprefix("#").strip())
    return " ".join(text).split(". ")[0].rstrip(".")


def load(name_or_file: str, *below: Path, over: dict | None = None) -> dict:
    """The settings of a recipe. `base:` names another one, whose settings hold where this one has
    none: groups of keys are merged, lists and values replace, and null takes a part out, also of
    the settings `over` which these will be merged.

    Raises ValueError that names the file: not YAML, no mapping, or its own base.
    """
    file = path(name_or_file)
    if file in below:
        raise ValueError(f"{file} is its own base: {' -> '.join(map(str, (*below, file)))}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    values = read_yaml(text, str(file))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a recipe is a mapping of keys, not {type(values).__name__}")
    name, base = values.pop("base", None), {}
    if name is not None:
        # A file names its base as a recipe, or relative to itself.
        beside = file.parent / str(name)
        base = load(str(beside) if beside.is_file() else str(name), *below, file)
    if file.suffix != ".json":  # recipe.json of a run states every key
        _check_nothing(file, merged(over or {}, base), values)
    return merged(base, values)


def read_yaml(text: str, what: str) -> Any:
    """The plain values of a YAML text. Raises ValueError that begins with `what`."""
    import yaml

    check_yaml(text, what)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{what} is not YAML: {error}") from error


def check_yaml(text: str, what: str) -> None:
    """Raise ValueError for a text that is no YAML, or whose values are more than a recipe can be. A
    line may refer to others, so that a few lines hold more than any machine: a reference counts as
    what it stands for."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        size = 0 if node is None else _size(node, {})
        twice = None if node is None else _twice(node, set())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{what} is not YAML: {error}") from error
    if size > MOST_VALUES:
        raise ValueError(f"{what} holds more than {MOST_VALUES} values")
    if twice is not None:
        raise ValueError(f"{what}: the key {twice} stands twice: the first one would be lost")


def _size(node, known: dict[int, float]) -> float:
    """The values in a node of YAML; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = node.value if isinstance(node.value, list) else []
        parts = [part for each in inside for part in (each if type(each) is tuple else (each,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _twice(node, known: set[int]) -> str | None:
    """A key that stands twice in one mapping inside of a node of YAML, and its line."""
    if id(node) in known or not isinstance(node.value, list):
        return None
    known.add(id(node))
    seen: set = set()
    for each in node.value:
        key, *rest = each if type(each) is tuple else (each,)
        if rest and isinstance(key.value, str):
            if key.value in seen:
                return f"{key.value!r} (line {key.start_mark.line + 1})"
            seen.add(key.value)
        for part in (key, *rest):
            if found := _twice(part, known):
                return found
    return None


def _check_nothing(file: Path, base: dict, values: dict) -> None:
    """Raise ValueError for a null objective that no base has, `friends:` for `friends: {}`."""
    for stage, settings in values.items():
        parts = settings.get("objectives") if isinstance(settings, dict) else None
        before = base.get(stage)
        known = (before.get("objectives") or {}) if isinstance(before, dict) else {}
        for name, part in parts.items() if isinstance(parts, dict) else ():
            if part is None and known.get(name) is None:
                raise ValueError(
                    f"{file}: {stage}.objectives.{name} is null, which takes a part of a base out,"
                    f" and there is none; with its defaults it is {name}: {{}}"
                )


def merged(base: dict, values: dict) -> dict:
    """Groups of keys are merged; lists and values of `values` replace those of `base`."""
    out = dict(base)
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out
