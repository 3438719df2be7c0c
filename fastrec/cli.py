# SPDX-License-Identifier: Apache-2.0
"""The command line: `fastrec prepare | pretrain | finetune | evaluate | recommend | similar | ...`.

`--config` takes a recipe name or a YAML file, and every recipe key is a flag that overrides it.
"""

import dataclasses
import inspect
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrec import recipes
from fastrec.bench import bench
from fastrec.cli_help import print_config, show_help
from fastrec.cli_prepare import generate, prepare
from fastrec.cli_serve import recommend, similar
from fastrec.cli_train import evaluate, finetune, pretrain
from fastrec.cli_vectors import adapter, embed, index
from fastrec.data.errors import input_errors
from fastrec.data.settings import from_values
from fastrec.demo import demo
from fastrec.nn.model_files import RECIPE
from fastrec.training.config import Recipe
from fastrec.training.stage import STAGE_KEYS
from fastrec.training.sweep import sweep


def list_recipes():
    """List the recipes with a line each."""
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        print(f"{name:{width}}  {recipes.summary(name)}")


_CHOICES = re.compile(
    r'Parser key "([^"]+)": Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)'
)
RECIPE_COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "sweep": sweep,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": list_recipes,
    "prepare": prepare,
    "generate": generate,
    "embed": embed,
    "recommend": recommend,
    "similar": similar,
    "index": index,
    "adapter": adapter,
    "bench": bench,
    "demo": demo,
}


def _parser():
    """The parser of all commands, without recipe keys."""
    from jsonargparse import ArgumentParser, get_loader, set_loader

    def load(text: str):
        recipes.check_yaml(text, "a value")
        return get_loader("yaml")(text)

    set_loader("fastrec", load, exceptions=(ValueError,))
    how: dict[str, Any] = {
        "exit_on_error": False, "parser_mode": "fastrec", "allow_abbrev": False,
    }  # fmt: skip
    parser = ArgumentParser(prog="fastrec", description=__doc__, **how)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in {**RECIPE_COMMANDS, **COMMANDS}.items():
        summary = " ".join((function.__doc__ or "").strip().split("\n\n")[0].split())
        sub = ArgumentParser(prog=f"fastrec {name}", description=summary, **how)
        if name not in RECIPE_COMMANDS:
            sub.add_argument("--config", action="config", help="YAML file of the flags")
        sub.add_function_arguments(function, skip={"recipe"}, as_group=False)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _recipe_settings(arguments: list[str]) -> tuple[dict, list[str]]:
    """(what the recipe after --config says, bases included, with the flags over it wherever they
    stand; the arguments that are no recipe keys)."""
    keys = {"config", *(field.name for field in dataclasses.fields(Recipe))}
    settings: dict = {}
    flags: dict = {}
    rest, given = [], iter(arguments)
    for argument in given:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.split(".")[0] not in keys:
            rest.append(argument)
            continue
        value = value if equals else next(given, "--")
        if not equals and value.startswith("--"):
            raise ValueError(f"--{key} has no value")
        if key == "config":
            settings = recipes.merged(settings, recipes.load(value, over=settings))
            continue
        part = recipes.read_yaml(value, key)
        for name in reversed(key.split(".")):
            part = {name: part}
        flags = recipes.merged(flags, part)
    return recipes.merged(settings, flags), rest


def _with_recipe(name: str, arguments: list[str]) -> None:
    """Run a command that takes a recipe. Its other flags may stand in the YAML file as well."""
    command = RECIPE_COMMANDS[name]
    if name == "evaluate" and not any(each.split("=")[0] == "--config" for each in arguments):
        arguments = [*_own_recipe(arguments), *arguments]
    settings, rest = _recipe_settings(arguments)
    own = [key for key in settings if key in inspect.signature(command).parameters]
    written = {key: settings.pop(key) for key in own}
    recipe = from_values(Recipe, settings)
    if "--print_config" in rest:
        return print_config(recipe)
    for key, value in written.items():
        rest.insert(0, f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    parser = _parser()
    config = parser.parse_args([name, *rest])
    command(recipe, **parser.instantiate(config)[name])


def _own_recipe(arguments: list[str]) -> list[str]:
    """--config with the recipe of the adapter that --adapter names, or else of the model that
    --pretrained does."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = dict([*pairs, *(a.partition("=")[::2] for a in arguments if "=" in a)])
    for flag in ("--adapter", "--pretrained"):
        if flag in given and (file := Path(given[flag]) / RECIPE).is_file():
            return ["--config", str(file)]
    return []


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Errors in the input end with status 1 and one line, not a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = lambda text, *_: f"fastrec: warning: {text}\n"
    name = arguments[0] if arguments else ""
    try:
        if name in RECIPE_COMMANDS and {"-h", "--help", "--help-all"} & set(arguments):
            return show_help(_parser(), name, whole="--help-all" in arguments)
        if name in RECIPE_COMMANDS:
            return _with_recipe(name, arguments[1:])
        parser = _parser()
        config = parser.parse_args(arguments)
        values = dict(parser.instantiate(config)[config.command])
        values.pop("config", None)
        COMMANDS[config.command](**values)
    except BrokenPipeError:  # who reads the output has seen enough: `fastrec recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        print(f"fastrec: {stop or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        from jsonargparse import ArgumentError

        full = type(error) is RuntimeError and "can't allocate memory" in str(error)
        if not full and not isinstance(error, (ArgumentError, *input_errors())):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"fastrec: error: {'not enough memory: ' if full else ''}{_in_words(said)}")


def _in_words(said: str) -> str:
    """What the parser says, without Python's names of types, and with the place of a stage's key
    that stands alone."""
    said = _CHOICES.sub(r"--\1 must be one of \2, got \3", said)
    _, unknown, rest = said.partition("unrecognized arguments: ")
    flags = [word.strip("-") for word in rest.split()] if unknown else []
    hints = [flag for flag in flags if flag.partition("=")[0] in STAGE_KEYS]
    return f"{said} (of a stage: --pretraining.{hints[0]})" if hints else said
