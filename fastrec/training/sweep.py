"""Pre-train, fine-tune and evaluate for several values of one recipe key: table and plot."""

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

from fastrec.data.dataset import SequenceDataset
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.protocols import Evaluator
from fastrec.evaluation.report import plot_sweep, print_table
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.tasks import select_users


def with_value(recipe, key: str, value):
    """The recipe with the field at a dotted `key` replaced, like "pretraining.batch_size".

    Raises ValueError for an unknown key or a value of another type.
    """
    name, _, rest = key.partition(".")
    fields = {field.name for field in dataclasses.fields(recipe)}
    if name not in fields:
        raise ValueError(
            f"{name!r} is no key of {type(recipe).__name__}; those are {sorted(fields)}"
        )
    old = getattr(recipe, name)
    if dataclasses.is_dataclass(old):
        if not rest:
            raise ValueError(f"{name!r} is a group of keys: {name}.KEY")
        return dataclasses.replace(recipe, **{name: with_value(old, rest, value)})
    if rest:
        raise ValueError(f"{name!r} has no key {rest!r}")
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if old is not None and type(value) is not type(old):
        raise ValueError(f"{key} is {old!r}, expected another {type(old).__name__}, got {value!r}")
    return dataclasses.replace(recipe, **{name: value})


def sweep(
    recipe: Recipe,
    data: Path,
    output: Path,
    key: str,
    values: list[bool | int | float | str],
    seeds: int = 1,
):
    """Compare values of one recipe key: pre-train, fine-tune, rank the test items; table and plot.

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
    if key.endswith(".seed") and key.split(".")[0] in ("pretraining", "finetuning"):
        raise ValueError(
            f"{key} is set by seeds={seeds}: the runs of each value have seeds 0, 1, ..."
        )
    recipes = {value: with_value(recipe, key, value) for value in values}
    dataset = SequenceDataset.load(data)
    results = {
        str(value): [
            _point(dataset, chosen, output / f"{key}={value}", seed) for seed in range(seeds)
        ]
        for value, chosen in recipes.items()
    }
    (output / "sweep.json").write_text(
        json.dumps({"key": key, "results": results}, indent=2) + "\n"
    )
    rows = {}
    for value, runs in results.items():
        columns = {metric: [100 * run[metric] for run in runs] for metric in runs[0]}
        rows[value] = [
            f"{mean(column):.2f}" + (f" ± {stdev(column):.2f}" if seeds > 1 else "")
            for column in columns.values()
        ]
    print_table([key, *next(iter(results.values()))[0]], rows, title=f"test, x 100, {seeds} seeds")
    plot_sweep(key, results, output / "sweep.png")
    print(f"plot: {output / 'sweep.png'}")


def _point(dataset, recipe: Recipe, folder: Path, seed: int) -> dict[str, float]:
    folder = folder / f"seed-{seed}"
    result, started = folder / "metrics.json", folder / "recipe.json"
    described = json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
    if started.is_file() and started.read_text() != described:
        raise ValueError(f"{folder} is from another recipe; choose another output folder")
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(described)
    stages = [dataclasses.replace(s, seed=seed) for s in (recipe.pretraining, recipe.finetuning)]
    model = None
    for name, stage in zip(("pretrain", "finetune"), stages, strict=True):
        run = folder / name
        if (run / "summary.json").is_file():
            model = UserModel.from_pretrained(run / "model")
            continue
        resume = (run / "last.ckpt").is_file()
        if not resume and run.is_dir():
            shutil.rmtree(run)  # it ended before its first checkpoint
        model = fit(dataset, recipe, stage, run, initial=model, resume=resume)
    evaluator = Evaluator(dataset, select_users(dataset, recipe), "test", recipe.evaluation)
    metrics = ranking_metrics(evaluator.ranks(model))
    result.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
