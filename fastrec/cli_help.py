# SPDX-License-Identifier: Apache-2.0
"""`fastrec pretrain --help` on one screen: the keys that people set, with their defaults;
`--help-all` lists every key."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from fastrec.data.steps.parts import Step
from fastrec.training.checkpoint import plain
from fastrec.training.config import STAGES, Recipe
from fastrec.training.stage import Stage

KEYS = (
    "model.width", "model.max_len", "model.dropout", "model.encoder", "model.tokens",
    "STAGE.views", "STAGE.objectives", "STAGE.steps", "STAGE.batch_size", "STAGE.learning_rate",
    "STAGE.schedule", "STAGE.weight_decay", "STAGE.precision", "STAGE.validate_every",
    "STAGE.patience", "STAGE.devices", "evaluation.candidates", "evaluation.seen",
    "users.fraction", "seed",
)  # fmt: skip


def show_help(parser, command: str, whole: bool = False) -> None:
    """Print usage, the flags of the command and recipe keys: those above, or all."""
    sub = parser._subcommands_action._name_parser_map[command]
    keys = recipe_keys()
    print(f"usage: fastrec {command} --config RECIPE [--KEY VALUE ...]\n")
    print(textwrap.fill(sub.description, 100), end="\n\n")
    print(_line("config", "recipe name (fastrec recipes) or YAML file; flags win over it", None))
    for action in sub._actions:
        if action.dest not in ("help", "print_config"):
            print(_line(action.dest, action.help or "", action.default, whole))
    for key in keys if whole else KEYS:
        print(_line(key, *keys[key], whole))
    print(f"\nSTAGE is {', '.join(STAGES[:-1])} or {STAGES[-1]}", end="")
    print("; STEP is one in the list of a view." if whole else ".")
    print("In brackets is what holds where neither the recipe nor a flag says otherwise.")
    print("All keys: --help-all; what a recipe sets them to: --config RECIPE --print_config.")


def print_config(recipe: Recipe) -> None:
    """Print a recipe with all its keys as YAML that `--config` reads."""
    import yaml

    print(yaml.safe_dump(_set(plain(recipe)), sort_keys=False), end="")


def _set(value: Any) -> Any:
    """The value without the keys that are null."""
    if isinstance(value, dict):
        return {name: _set(part) for name, part in value.items() if part is not None}
    return [_set(part) for part in value] if isinstance(value, list) else value


def recipe_keys() -> dict[str, tuple[str, object]]:
    """(text, default) of every recipe key; those of a stage and of a step once."""
    parts = ((Recipe, ""), (Stage, "STAGE"), (Step, "STEP"))
    return {key: rest for kind, name in parts for key, *rest in _keys(kind, name)}  # type: ignore[misc]


def _keys(kind, path: str) -> Iterator[tuple[str, str, object]]:
    from docstring_parser import parse

    texts = {
        name.strip(): each.description or ""
        for each in parse(kind.__doc__).params
        for name in each.arg_name.split(",")
    }
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = f"{path}.{field.name}".lstrip(".")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield key, texts.get(field.name, ""), default
        for section in _sections(hints[field.name]):
            if section not in (Stage, Step):
                inside = ".N" if isinstance(default, list) else ".NAME" * isinstance(default, dict)
                yield from _keys(section, key + inside)


def _sections(hint) -> Iterator[type]:
    """The dataclasses in a type hint."""
    if dataclasses.is_dataclass(hint):
        yield hint  # type: ignore[misc]
    for part in get_args(hint):
        yield from _sections(part)


def _line(key: str, text: str, default: object, whole: bool = False) -> str:
    sentence = " ".join(str(text).split()).split("(required")[0].split("(type:")[0].strip()
    sentence = sentence if sentence.endswith("..") else sentence.removesuffix(".")
    if not whole:
        sentence = sentence.split(". ")[0]
    if len(sentence) > 62 and not whole:
        sentence = sentence[:60].rsplit(" ", 1)[0] + " .."
    shown = isinstance(default, (int, float, str)) or (isinstance(default, list) and default)
    end = f" [{default}]" if shown and not str(default).startswith("==") else ""
    flag = key if key.startswith("STEP.") or ".N." in key else f"--{key}"
    return f"  {flag:<28} {sentence}{end}"
