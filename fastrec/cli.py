"""The command line: `fastrec prepare | pretrain | finetune | evaluate | recommend | similar | ...`.

`--config` takes a recipe name or a YAML file, and every recipe key is a flag that overrides it.
"""

import contextlib
import dataclasses
import inspect
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastrec import __version__, recipes, threads
from fastrec.backend import device_of
from fastrec.bench import bench
from fastrec.cli_help import print_config, show_help
from fastrec.cli_serve import embed, model_for, recommend, similar
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import input_errors
from fastrec.data.output import locked_file, write_text
from fastrec.data.prepare import prepare as prepare_dataset
from fastrec.data.settings import from_values
from fastrec.demo import demo
from fastrec.evaluation.next_item import Protocol
from fastrec.nn.model_files import RECIPE, read_json
from fastrec.training.checkpoint import MODEL, SUMMARY, first_process, plain
from fastrec.training.config import Recipe, Stage, Users
from fastrec.training.evaluate import evaluate_stage
from fastrec.training.model_folder import recipe_of
from fastrec.training.sweep import sweep


def prepare(
    source: Path,
    output: Path,
    format: Literal["s3rec", "pairs", "movielens-1m", "movielens-100k", "recbole", "table"],
    k_core: int = 0,
    min_rating: float | None = None,
    max_users: int | None = None,
    user_attributes: Path | None = None,
    item_attributes: Path | None = None,
    relations: Path | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = None,
    rating_column: str | None = None,
    user_key: str | None = None,
    item_key: str | None = None,
    ids: Literal["auto", "int", "str"] = "auto",
    na_values: Literal["ask", "missing", "text"] = "ask",
    time_format: str | None = None,
    separator: str | None = None,
    ordered: bool = False,
    on_duplicate: Literal["error", "keep", "drop"] = "error",
    overwrite: bool = False,
):
    """Turn a raw file into a data set that the other commands read.

    Args:
        source: a file, or a folder for movielens and recbole.
        output: folder of the data set.
        format: of the source; "table" is any csv, tsv, Parquet or JSON-lines file.
        k_core: remove users and items with fewer events, again and again.
        min_rating: remove events rated below.
        max_users: keep only the first users in order of their id.
        user_attributes: file with a column of user ids, called user_id, user or as in the source.
        item_attributes: file with a column of item ids, or the attribute JSON of S3-Rec.
        relations: file whose first two columns are user and friend.
        user_column: of a table.
        item_column: of a table.
        timestamp_column: of a table: integers, dates or ISO times.
        rating_column: of a table.
        user_key: column of user_attributes that holds the ids, if it is called otherwise.
        item_key: the same of item_attributes.
        ids: take ids as integers where all are, demand it, or keep text, in table and recbole.
        na_values: whether words such as NA are missing values or text; without it they are refused.
        time_format: how other times are written, such as "%m/%d/%Y" or "%d.%m.%Y %H:%M:%S".
        separator: of a table, if its suffix does not say it.
        ordered: each user's rows are oldest first: a table or recbole file without times needs it.
        on_duplicate: what to do with the same user, item and time twice.
        overwrite: replace a data set in `output`.
    """
    options: dict = {}
    if format in ("table", "recbole"):
        options = {"ids": ids, "time_format": time_format, "ordered": ordered}
    elif ids != "auto" or time_format is not None or ordered:
        raise ValueError(f"--ids, --time_format and --ordered have no effect on --format {format}")
    if format == "table":
        options |= {"user": user_column, "item": item_column, "timestamp": timestamp_column}
        options |= {"rating": rating_column, "separator": separator}
    elif (user_column, item_column) != ("user_id", "item_id") or timestamp_column or rating_column:
        raise ValueError(f"column names are for --format table, {format} has its own")
    elif separator is not None:
        raise ValueError(f"--separator has no effect on --format {format}")
    if format not in ("s3rec", "pairs"):
        options["on_duplicate"] = on_duplicate
    elif on_duplicate != "error":
        raise ValueError(
            f"--on_duplicate has no meaning for {format}: its rows are distinct events"
        )
    report = prepare_dataset(
        source,
        output,
        format=format,
        k_core=k_core,
        min_rating=min_rating,
        max_users=max_users,
        user_attributes=user_attributes,
        item_attributes=item_attributes,
        relations=relations,
        user_key=user_key,
        item_key=item_key,
        na_values=na_values,
        overwrite=overwrite,
        **options,
    )
    print(report)


def pretrain(recipe: Recipe, data: Path, output: Path, resume: bool = False, device: str = "auto"):
    """Train the first stage of a recipe, `pretraining`, on a prepared data set.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        resume: go on from the last checkpoint in `output`.
        device: cpu, cuda or cuda:N; auto is all GPUs, or the CPU.
    """
    from fastrec.training.fit import fit  # Lightning, 3 s: other commands do without it

    dataset = SequenceDataset.load(data)
    recipe.stage("pretraining")
    _print_threads()
    fit(dataset, recipe=recipe, stage="pretraining", output=output, resume=resume, device=device)
    _print_run(output)


def finetune(
    recipe: Recipe,
    data: Path,
    output: Path,
    task: str = "recommendation",
    init: Path | None = None,
    resume: bool = False,
    device: str = "auto",
):
    """Train another stage of a recipe: next-item recommendation, user profiles or friends.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        task: name of the stage: recommendation, profile, relation.
        init: folder of a pre-trained model; random weights without it.
        resume: go on from the last checkpoint in `output`.
        device: cpu, cuda or cuda:N; auto is all GPUs, or the CPU.
    """
    from fastrec.training.fit import fit

    dataset, stage = SequenceDataset.load(data), recipe.stage(task)
    initial = None
    if init is not None:
        same_items = bool({"items", "head"} & set(stage.init.take))
        held_out = _held_out(recipe, stage) if stage.init.users == "same" else None
        # Other people have no vectors there: theirs start anew.
        same_users = "head" in stage.init.take and stage.init.users == "same"
        initial = model_for(init, dataset, held_out, same_items, same_users)
    _print_threads()
    fit(
        dataset,
        initial,
        recipe=recipe,
        stage=task,
        output=output,
        initial_folder=init,
        resume=resume,
        device=device,
    )
    _print_run(output)


def evaluate(
    recipe: Recipe,
    data: Path,
    pretrained: Path,
    task: str | None = None,
    split: Literal["valid", "test"] = "test",
    output: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Measure a model as a stage of the recipe judges it, beside a baseline. Without --config the
    recipe is that of the model.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        task: name of the stage whose judge is asked; recommendation if the recipe has it, else
            pretraining. The next item of each user is ranked beside popularity and by length of the
            sequence; attributes of held-out users are predicted beside mean and most frequent
            class; their friends are found beside shared items ("Sim").
        split: which held-out item, for the next item.
        output: JSON file for the metrics.
        overwrite: replace a file `output`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    with contextlib.nullcontext() if output is None else locked_file(output, overwrite):
        result = _evaluate(recipe, data, pretrained, task, split, device)
        if output is not None:
            write_text(output, json.dumps(result, indent=2) + "\n")


def _evaluate(
    recipe: Recipe, data: Path, pretrained: Path, task: str | None, split: str, device: str
) -> dict:
    dataset = SequenceDataset.load(data)
    task = task or ("recommendation" if "recommendation" in recipe.stages else "pretraining")
    stage = recipe.stage(task)
    asked = stage.judge == "next_item"  # other judges read no user vectors
    trained = model_for(pretrained, dataset, _held_out(recipe, stage), same_users=asked)
    if asked:
        _say_other_protocol(pretrained, recipe)
    trained = trained.to(device_of(device))
    return evaluate_stage(dataset, recipe, stage, trained, pretrained, split)


def list_recipes():
    """List the recipes with a line each."""
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        print(f"{name:{width}}  {recipes.summary(name)}")


def _print_threads() -> None:
    if first_process():
        print(threads.described())


def _print_run(output: Path) -> None:
    """The best step, its metrics, and where everything is."""
    if not first_process():
        return
    run = read_json(output / SUMMARY)
    best = ", ".join(f"{name} {value:.4f}" for name, value in run["valid"].items())
    print(f"best on validation: step {run['best_step']:,} of {run['steps']:,}: {best}")
    print(f"model: {output / MODEL}\nlogs: {output}/metrics, /validation and /tensorboard")


def _say_other_protocol(pretrained: Path, recipe: Recipe) -> None:
    """A model remembers how it was validated: numbers under two protocols are not compared."""
    known = recipe_of(pretrained)
    if known is not None and known.get("evaluation") != plain(recipe.evaluation):
        chosen = from_values(Protocol, known["evaluation"])
        print(f"the model was chosen by another protocol: {chosen}")


def _held_out(recipe: Recipe, stage: Stage) -> Users | None:
    """The users that a stage is tested on, where these are not trained on."""
    return None if stage.judge == "next_item" else recipe.users


RECIPE_COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "sweep": sweep,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": list_recipes,
    "prepare": prepare,
    "embed": embed,
    "recommend": recommend,
    "similar": similar,
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
    how: dict[str, Any] = {"exit_on_error": False, "parser_mode": "fastrec"}
    parser = ArgumentParser(prog="fastrec", description=__doc__, **how)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in {**RECIPE_COMMANDS, **COMMANDS}.items():
        summary = (function.__doc__ or "").strip().splitlines()[0]
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
            settings = recipes.merged(settings, recipes.load(value))
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
    """--config with the recipe of the model that --pretrained names."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for flag, value in [*pairs, *(a.partition("=")[::2] for a in arguments)]:
        if flag == "--pretrained" and (Path(value) / RECIPE).is_file():
            return ["--config", str(Path(value) / RECIPE)]
    return []


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Errors in the input end with status 1 and one line, not a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name == "--version":
        return print(f"fastrec {__version__}")
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
    except KeyboardInterrupt as stop:
        print(f"fastrec: {stop or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        from jsonargparse import ArgumentError

        full = type(error) is RuntimeError and "can't allocate memory" in str(error)
        if not full and not isinstance(error, (ArgumentError, *input_errors())):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"fastrec: error: {'not enough memory: ' if full else ''}{said}")
