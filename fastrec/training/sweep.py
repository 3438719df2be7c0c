# SPDX-License-Identifier: Apache-2.0
"""Pre-train, fine-tune and evaluate for several values of one recipe key: table and plot."""

import dataclasses
import json
from pathlib import Path
from statistics import mean, stdev
from typing import get_type_hints

from fastrec.data.dataset import SequenceDataset
from fastrec.data.output import locked, write_json, write_text
from fastrec.data.settings import from_values
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.report import plot_sweep, print_table
from fastrec.nn.model_files import read_json
from fastrec.nn.text_model import TextModel
from fastrec.nn.user_model import UserModel
from fastrec.training.checkpoint import identity, plain
from fastrec.training.config import Recipe
from fastrec.training.model_folder import load_model
from fastrec.training.stage_data import select_users


def with_value(recipe, key: str, value):
    """The recipe with the field at a dotted `key` replaced, like "pretraining.batch_size", or
    "pretraining.views.main.0.mask.share" for the first step of a view.

    Raises ValueError for an unknown key or a value of another type.
    """
    name, _, rest = key.partition(".")
    if isinstance(recipe, list):
        parts = {str(i): part for i, part in enumerate(recipe)}
    elif isinstance(recipe, dict):
        parts = recipe
    else:
        parts = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    if name not in parts:
        raise ValueError(f"{name!r} is no key of {type(recipe).__name__}; those are {[*parts]}")
    old = parts[name]
    if dataclasses.is_dataclass(old) or isinstance(old, (dict, list)):
        if not rest:
            raise ValueError(f"{name!r} is a group of keys: {name}.KEY")
        new = with_value(old, rest, value)
    elif rest:
        raise ValueError(f"{name!r} has no key {rest!r}")
    else:
        new = float(value) if isinstance(old, float) and type(value) is int else value
        if old is None and dataclasses.is_dataclass(recipe):
            new = from_values(get_type_hints(type(recipe))[name], value, key)
        elif old is not None and type(new) is not type(old):
            raise ValueError(
                f"{key} is {old!r}, expected another {type(old).__name__}, got {value!r}"
            )
    if isinstance(recipe, dict):
        return {**recipe, name: new}
    if isinstance(recipe, list):
        return [*({**parts, name: new}).values()]
    return dataclasses.replace(recipe, **{name: new})


def sweep(
    recipe: Recipe,
    data: Path,
    output: Path,
    key: str,
    values: list[bool | int | float | str],
    seeds: int = 1,
):
    """Compare values of one recipe key: train, rank the test items; table and plot.

    Pre-training is followed by the stage recommendation where the recipe has it.

    A finished stage is not computed again, so the command can be repeated after an interruption,
    with more values or more seeds. UPRec's figures 4 to 6 are the keys pretraining.steps,
    pretraining.batch_size and model.width.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the runs, `sweep.json` and `sweep.png`.
        key: of the recipe, with dots.
        values: to try.
        seeds: runs of each value, with seeds 0, 1, ...
    """
    if not values or seeds < 1:
        raise ValueError(f"there is nothing to run: values {values}, seeds {seeds}")
    if key == "seed":
        raise ValueError(
            f"{key} is set by seeds={seeds}: the runs of each value have seeds 0, 1, ..."
        )
    ranked = "recommendation" in recipe.stages or "pretraining" not in recipe.stages
    alone = {"rating": "ratings", "click": "clicks"}
    if not ranked and (judge := recipe.stages["pretraining"].judge) in alone:
        raise ValueError(f"a sweep ranks next items, and this recipe trains {alone[judge]} alone")
    recipes = {value: with_value(recipe, key, value) for value in values}
    for chosen in recipes.values():
        for name, stage in chosen.stages.items():
            if stage.devices not in ("auto", 1) or stage.num_nodes > 1:
                raise ValueError(
                    f"a sweep trains in one process: {name}.devices is {stage.devices} and"
                    f" num_nodes {stage.num_nodes}"
                )
    dataset = SequenceDataset.load(data)
    with locked(output):
        results = {
            str(value): [
                _point(dataset, chosen, output / f"{key}={value}", seed) for seed in range(seeds)
            ]
            for value, chosen in recipes.items()
        }
        text = json.dumps({"key": key, "results": results}, indent=2) + "\n"
        write_text(output / "sweep.json", text)
        _show(key, results, seeds, output / "sweep.png")


def _show(key: str, results: dict[str, list[dict[str, float]]], seeds: int, plot: Path) -> None:
    rows = {}
    for value, runs in results.items():
        columns = {metric: [100 * run[metric] for run in runs] for metric in runs[0]}
        rows[value] = [
            f"{mean(column):.2f}" + (f" ± {stdev(column):.2f}" if seeds > 1 else "")
            for column in columns.values()
        ]
    print_table([key, *next(iter(results.values()))[0]], rows, title=f"test, x 100, {seeds} seeds")
    plot_sweep(key, results, plot)
    print(f"plot: {plot}")


def _point(dataset, recipe: Recipe, folder: Path, seed: int) -> dict[str, float]:
    from fastrec.training.fit import fit  # Lightning, 3 s: `fastrec --help` does without it

    folder, recipe = folder / f"seed-{seed}", dataclasses.replace(recipe, seed=seed)
    result, started = folder / "metrics.json", folder / "point.json"
    stages = [name for name in ("pretraining", "recommendation") if name in recipe.stages]
    point = {"recipe": plain(recipe)} | {name: identity(dataset, recipe, name) for name in stages}
    text = json.dumps(point, indent=2) + "\n"
    if started.is_file() and started.read_text(encoding="utf-8", errors="replace") != text:
        raise ValueError(
            f"{folder} is from another recipe or data set; choose another output folder"
        )
    if result.is_file():
        return _metrics(result)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(started, text)
    model: UserModel | TextModel | None = None
    before: Path | None = None
    for name in stages:
        run = folder / name
        if (run / "summary.json").is_file():
            model, before = load_model(run / "model", dataset, same_users=False), run / "model"
            continue
        resume = (run / "last.ckpt").is_file()
        model = fit(
            dataset, model, recipe=recipe, stage=name, output=run, resume=resume,
            initial_folder=before, devices=1,
        )  # fmt: skip
        before = run / "model"
    chosen = select_users(dataset, recipe.users, "test")
    judge = NextItemJudge(dataset, chosen, "test", recipe.evaluation)
    metrics = judge.metrics(judge.ranks(model))
    write_json(result, metrics)
    return metrics


def _metrics(file: Path) -> dict[str, float]:
    values = read_json(file)
    if not values or not all(type(each) is float for each in values.values()):
        raise ValueError(f"{file} holds no metrics; remove it, and they are computed again")
    return values
