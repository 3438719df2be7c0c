"""The command line: `fastrec prepare | pretrain | finetune | evaluate | embed | recommend | ...`.

Flags come from the type hints and docstrings of the functions below and of `Recipe`. `--config`
takes a recipe name or a YAML file, and every recipe key is a flag that overrides it.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastrec import recipes
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare as prepare_dataset
from fastrec.evaluation.metrics import length_groups, ranking_metrics
from fastrec.evaluation.profile import ProfileEvaluator
from fastrec.evaluation.protocols import Evaluator, row_blocks
from fastrec.evaluation.relation import RelationEvaluator
from fastrec.evaluation.report import print_metrics
from fastrec.evaluation.serve import check_table_path, user_vectors, write_table
from fastrec.evaluation.serve import recommend as recommend_items
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.training.config import Recipe, Users
from fastrec.training.demo import demo
from fastrec.training.fit import fit
from fastrec.training.heads import FILE as HEADS
from fastrec.training.heads import load_heads
from fastrec.training.run_folder import check_model, first_process, trained_on
from fastrec.training.step_time import bench
from fastrec.training.sweep import sweep
from fastrec.training.tasks import Task, encoded_attributes, held_out_users, select_users


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
        user_attributes: file with a user_id column.
        item_attributes: file with an item_id column, or the attribute JSON of S3-Rec.
        relations: file whose first two columns are user and friend.
        user_column: of a table.
        item_column: of a table.
        timestamp_column: of a table; without it the file must be in order.
        rating_column: of a table.
        on_duplicate: what to do with the same user, item and time twice.
        overwrite: replace a data set in `output`.
    """
    options: dict = {}
    if format == "table":
        options = {"user": user_column, "item": item_column, "timestamp": timestamp_column}
        options |= {"rating": rating_column, "ordered": timestamp_column is None}
    elif (user_column, item_column) != ("user_id", "item_id") or timestamp_column or rating_column:
        raise ValueError(f"column names are for --format table, {format} has its own")
    if format not in ("s3rec", "pairs"):
        options["on_duplicate"] = on_duplicate
    elif on_duplicate != "error":
        raise ValueError(f"on_duplicate has no meaning for {format}: its rows are distinct events")
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
        overwrite=overwrite,
        **options,
    )
    print(report)


def pretrain(recipe: Recipe, data: Path, output: Path, resume: bool = False):
    """Pre-train a user model on a prepared data set.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        resume: go on from the last checkpoint in `output`.
    """
    fit(SequenceDataset.load(data), recipe, recipe.pretraining, output, resume=resume)
    _print_model(output)


def finetune(
    recipe: Recipe,
    data: Path,
    output: Path,
    task: Task = "recommendation",
    init: Path | None = None,
    resume: bool = False,
):
    """Fine-tune for a task: next-item recommendation, user profile prediction or friends.

    Args:
        data: folder written by `fastrec prepare`.
        output: folder of the run; the best model on validation is in `output/model`.
        task: recommendation trains `finetuning` of the recipe, profile `profile`, relation
            `relation`.
        init: folder of a pre-trained model; random weights without it.
        resume: go on from the last checkpoint in `output`.
    """
    dataset = SequenceDataset.load(data)
    held_out = None if task == "recommendation" else recipe.users
    initial = None if init is None else _model_for(init, dataset, held_out)
    stages = {
        "recommendation": recipe.finetuning,
        "profile": recipe.profile,
        "relation": recipe.relation,
    }
    fit(
        dataset,
        recipe,
        stages[task],
        output,
        task=task,
        initial=initial,
        initial_folder=init,
        resume=resume,
    )
    _print_model(output)


def evaluate(
    recipe: Recipe,
    data: Path,
    pretrained: Path,
    task: Task = "recommendation",
    split: Literal["valid", "test"] = "test",
    output: Path | None = None,
):
    """Measure a model on a task and print the metrics beside a baseline.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        task: recommendation ranks the held-out item of each user, beside popularity and by length
            of the sequence; profile predicts the attributes of the held-out users, beside mean and
            most frequent class; relation finds their friends, beside shared items ("Sim").
        split: which held-out item, for recommendation.
        output: JSON file for the metrics.
    """
    dataset = SequenceDataset.load(data)
    trained = _model_for(pretrained, dataset, None if task == "recommendation" else recipe.users)
    if task == "recommendation":
        result = _evaluate_recommendation(recipe, dataset, trained, split)
    elif task == "profile":
        result = _evaluate_profile(recipe, dataset, trained, pretrained)
    else:
        result = _evaluate_relation(recipe, dataset, trained, pretrained)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def _evaluate_recommendation(recipe: Recipe, dataset, trained: UserModel, split: str) -> dict:
    evaluator = Evaluator(dataset, select_users(dataset, recipe), split, recipe.evaluation)
    ranks = evaluator.ranks(trained)
    rows = {
        "popularity": ranking_metrics(evaluator.popularity_ranks()),
        "model": ranking_metrics(ranks),
    }
    print(f"{len(evaluator)} users, {split}, {recipe.evaluation}")
    print_metrics(rows)
    groups = {
        f"{label} ({mask.sum()} users)": ranking_metrics(ranks[mask])
        for label, mask in length_groups(dataset.lengths[evaluator.users.numpy()])
    }
    print_metrics(groups, title="model, by number of events of the user")
    return {
        "split": split,
        "users": len(evaluator),
        "metrics": rows,
        "by_length": groups,
        "protocol": dataclasses.asdict(recipe.evaluation),
    }


def _evaluate_profile(recipe: Recipe, dataset, trained: UserModel, path: Path) -> dict:
    users, attributes = held_out_users(dataset, recipe), encoded_attributes(dataset, recipe)
    pool = trained_on(path).get("attribute_pool", recipe.profile.objectives.attribute_pool)
    objectives = dataclasses.replace(recipe.profile.objectives, attribute_pool=pool)
    objective = JointObjective(objectives, trained, attributes, dataset.item_counts)
    load_heads(objective, path)
    evaluator = ProfileEvaluator(dataset, users, "all", attributes, select_users(dataset, recipe))
    scores = _all_scores(evaluator, trained, objective)
    rows = {
        "constant": evaluator.metrics(evaluator.baseline()),
        "model": evaluator.metrics(scores),
    }
    print(f"{len(users)} held-out users, {len(attributes)} attributes")
    print_metrics(rows, scale=1, digits=4)
    return {"users": len(users), "metrics": rows}


def _evaluate_relation(recipe: Recipe, dataset, trained: UserModel, path: Path) -> dict:
    users, social = held_out_users(dataset, recipe), recipe.social
    evaluator = RelationEvaluator(dataset, users, "all", social.negatives, social.seed)
    objective = JointObjective(recipe.relation.objectives, trained, [], dataset.item_counts)
    taken = load_heads(objective, path, only="social_relation.")
    rows = {
        "shared items (Sim)": evaluator.shared_items(),
        "model": evaluator.metrics(_all_scores(evaluator, trained, objective), objective),
    }
    pairs = len(evaluator.queries)
    deviation = 100 * (rows["model"]["accuracy"] * (1 - rows["model"]["accuracy"]) / pairs) ** 0.5
    print(f"{pairs} pairs of held-out users, 1 friend and {social.negatives} others")
    print(
        f"similarity: {'trained weights' if taken else f'equal weights, {path / HEADS} has none'}"
    )
    print_metrics(rows)
    print(f"standard error of the model's accuracy: {deviation:.2f}")
    return {"pairs": pairs, "trained_similarity": bool(taken), "metrics": rows}


def _all_scores(evaluator, model: UserModel, objective) -> Tensor:
    blocks = row_blocks(len(evaluator))
    return torch.cat([evaluator.score(model, objective, rows) for rows in blocks])


def embed(data: Path, pretrained: Path, output: Path, users: Path | None = None):
    """Write user vectors (max-pooled states, UPRec eq. 8) to a Parquet file.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .parquet file with columns user_id and vector.
        users: text file with one original user id a line; all users without it.
    """
    if output.suffix != ".parquet":
        raise ValueError(f"{output}: user vectors are written to a .parquet file")
    dataset = SequenceDataset.load(data)
    write_table(user_vectors(_model_for(pretrained, dataset), dataset, _read_users(users)), output)


def recommend(
    data: Path,
    pretrained: Path,
    output: Path,
    users: Path | None = None,
    k: int = 10,
    seen: Literal["exclude", "none"] = "exclude",
    logit_adjustment: float = 0.0,
):
    """Write the k best next items of each user, in the ids of the original data.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .csv or .parquet file with columns user_id, rank, item_id, score.
        users: text file with one original user id a line; all users without it.
        k: items a user.
        seen: leave out or keep the items that a user already has.
        logit_adjustment: what is taken from a score is this times the log of the item's share of
            the training events; with 1, items are ranked by how much likelier the user makes them.
    """
    check_table_path(output)
    dataset = SequenceDataset.load(data)
    trained = _model_for(pretrained, dataset)
    write_table(
        recommend_items(trained, dataset, k, _read_users(users), seen, logit_adjustment), output
    )


def _print_model(output: Path) -> None:
    if first_process():
        print(f"model: {output / 'model'}")


def _model_for(path: Path, dataset: SequenceDataset, held_out: Users | None = None) -> UserModel:
    model = UserModel.from_pretrained(path)
    if model.num_items != dataset.num_items:
        raise ValueError(
            f"{path} was trained on {model.num_items} items, {dataset.path} has {dataset.num_items}"
        )
    check_model(path, dataset, held_out)
    return model


def _read_users(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


RECIPE_COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "sweep": sweep,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "embed": embed,
    "recommend": recommend,
    "bench": bench,
    "demo": demo,
}


def _parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fastrec", description=__doc__)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in {**RECIPE_COMMANDS, **COMMANDS}.items():
        summary = (function.__doc__ or "").strip().splitlines()[0]
        sub = ArgumentParser(prog=f"fastrec {name}", description=summary)
        takes = "recipe name or YAML file" if name in RECIPE_COMMANDS else "YAML file of the flags"
        sub.add_argument("--config", action="config", help=takes)
        if name in RECIPE_COMMANDS:
            sub.add_class_arguments(Recipe, as_group=False)
            sub.add_function_arguments(function, skip={"recipe"}, as_group=False)
        else:
            sub.add_function_arguments(function, as_group=False)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _resolve_recipes(arguments: list[str]) -> list[str]:
    """Replace the recipe name after --config with its file."""
    out = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            out[i + 1] = str(recipes.path(arguments[i + 1]))
        elif argument.startswith("--config="):
            out[i] = f"--config={recipes.path(argument.removeprefix('--config='))}"
    return out


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Errors in the input end with status 1 and one line, not a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parser = _parser()
        config = parser.parse_args(_resolve_recipes(arguments))
        name = config.command
        values = dict(parser.instantiate(config)[name])
        values.pop("config", None)
        if name in RECIPE_COMMANDS:
            fields = [field.name for field in dataclasses.fields(Recipe)]
            recipe = Recipe(**{field: values.pop(field) for field in fields})
            RECIPE_COMMANDS[name](recipe, **values)
        else:
            COMMANDS[name](**values)
    except (ValueError, OSError) as error:
        sys.exit(f"fastrec: error: {error}")
