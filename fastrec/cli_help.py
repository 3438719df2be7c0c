"""`fastrec pretrain --help` on one screen: the keys that people set, with their defaults."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator

KEYS = {
    "model": ("width", "max_len", "dropout", "encoder", "tokens"),
    "STAGE": (
        "views", "objectives", "steps", "batch_size", "learning_rate", "schedule", "weight_decay",
        "precision", "validate_every", "patience", "devices",
    ),
    "evaluation": ("candidates", "seen"),
    "users": ("fraction",),
}  # fmt: skip


def recipe_help(name: str, function: Callable, recipe: type) -> str:
    """Usage, the arguments of a command and the keys above of its recipe."""
    fields = {field.name: field for field in dataclasses.fields(recipe)}
    stages = [key for key, field in fields.items() if "Stage" in str(field.type)]
    summary = (inspect.getdoc(function) or "").splitlines()[0]
    lines = [f"usage: fastrec {name} --config RECIPE [--KEY VALUE ...]", "", summary, ""]
    lines.append(_line("config", "recipe name (fastrec recipes) or YAML file, which flags change"))
    defaults = inspect.signature(function).parameters
    for argument, text in _documented(function):
        default = defaults[argument].default
        lines.append(_line(argument, text, None if default is inspect.Parameter.empty else default))
    for group, keys in KEYS.items():
        kind = _kind(fields["pretraining" if group == "STAGE" else group])
        texts = dict(_documented(kind))
        own = {field.name: field.default for field in dataclasses.fields(kind)}
        lines += [_line(f"{group}.{key}", texts.get(key, ""), own[key]) for key in keys]
    lines.append(_line("seed", dict(_documented(recipe))["seed"], fields["seed"].default))
    lines += ["", f"STAGE: {', '.join(stages)}."]
    lines += ["All keys: --help-all. What a recipe sets them to: --print_config."]
    return "\n".join(lines)


def _kind(field) -> type:
    """The dataclass of a field, optional or not."""
    kinds = getattr(field.type, "__args__", [field.type])
    return next(kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind))


def _documented(thing) -> Iterator[tuple[str, str]]:
    """(name, description) of the arguments or attributes in a docstring."""
    from docstring_parser import parse

    for parameter in parse(inspect.getdoc(thing) or "").params:
        yield parameter.arg_name, " ".join((parameter.description or "").split())


def _line(key: str, text: str, default: object = None) -> str:
    short = text.split(". ")[0].split("; ")[0].rstrip(".:;")
    if len(short) > 60:
        short = short[:58].rsplit(" ", 1)[0].rstrip(",") + " .."
    plain = isinstance(default, (int, float, str))
    return f"  --{key:<23} {short}" + (f" [{default}]" if plain else "")
