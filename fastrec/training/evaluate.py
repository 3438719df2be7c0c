# SPDX-License-Identifier: Apache-2.0
"""A trained model as the judge of a stage sees it, printed beside a baseline."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastrec.data.cold_items import ColdItems, ColdRows
from fastrec.data.output import write_table
from fastrec.data.settings import from_values
from fastrec.data.side import SideData
from fastrec.evaluation.attributes import AttributesJudge
from fastrec.evaluation.blocks import scores_of
from fastrec.evaluation.click import ClickJudge
from fastrec.evaluation.cold_start import ColdStartJudge
from fastrec.evaluation.friends import FriendsJudge
from fastrec.evaluation.metrics import length_groups, list_metrics
from fastrec.evaluation.next_item import NextItemJudge, check_scores
from fastrec.evaluation.rating import RatingJudge
from fastrec.evaluation.report import print_metrics
from fastrec.evaluation.vectors import VectorsJudge
from fastrec.nn.model_files import HEADS
from fastrec.nn.pool import Pooling
from fastrec.nn.text_model import TextModel
from fastrec.nn.user_model import UserModel
from fastrec.objectives.friends import Friends
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.config import Recipe
from fastrec.training.heads_file import load_heads, saved_scales
from fastrec.training.stage import Stage
from fastrec.training.stage_data import (
    cold_side,
    held_out_users,
    select_users,
    side_data,
    trained_users,
)


def evaluate_stage(
    dataset,
    recipe: Recipe,
    stage: Stage,
    model: UserModel | TextModel,
    folder: Path,
    split: str = "test",
    ranks: Path | None = None,
    group=None,
) -> dict:
    """Print and return the metrics of the test users of a stage.

    folder: of the model, with the parameters of its objectives.
    split: for the judges of the next item, of ratings and clicks: which events are held out; of
        vectors: which input; of cold start: which rows.
    ranks: for the judges of the next item and of cold start: a .csv or .parquet file for user_id,
        item_id (the target) and rank, a row for each target.
    group: a process group: its processes share the users, and all of them return the metrics.
    """
    kind = stage.judge_kind
    if kind.next_item:
        return _next_item(dataset, recipe, model, split, ranks, group)
    if isinstance(model, TextModel):
        raise ValueError(f"{folder} reads the texts of items: {stage.judge} is not asked of it")
    if kind.rows:
        return _cold_start(dataset, recipe, stage, model, folder, split, ranks, group)
    if ranks is not None:
        raise ValueError(f"--ranks has no effect: this stage judges {stage.judge}")
    if kind.held_out and split != "test":
        raise ValueError(f"--split {split} has no effect: this stage judges {stage.judge}")
    printed = {
        "vectors": _vectors, "rating": _rating, "click": _click, "attributes": _attributes,
        "friends": _friends,
    }  # fmt: skip
    return printed[stage.judge](dataset, recipe, stage, model, folder, split, group)


def _next_item(dataset, recipe: Recipe, model, split: str, file: Path | None, group) -> dict:
    check_scores(model)
    chosen = select_users(dataset, recipe.users, split)
    judge = NextItemJudge(dataset, chosen, split, recipe.evaluation)
    ranks = judge.ranks(model, group)
    if file is not None:  # before anything is printed, which `head` may cut off
        write_table(_ranks_table(judge, ranks), file, overwrite=True)
    rows = {
        "popularity": judge.metrics(judge.popularity_ranks(group)),
        "model": judge.metrics(ranks),
    }
    several = len(judge.targets) > len(judge)
    said = f" with {len(judge.targets):,} targets, those of a user in one ranking"
    print(f"{len(judge):,} users{said if several else ''}, split {split}, {recipe.evaluation}")
    print_metrics(rows)
    groups = {
        f"{label} ({mask.sum()} users)": judge.metrics(ranks, users=torch.from_numpy(mask))
        for label, mask in length_groups(dataset.lengths[judge.users.numpy()])
    }
    print_metrics(groups, title="model, by number of events of the user")
    lists = _lists(judge, model, group) if recipe.evaluation.candidates == "full" else {}
    if file is not None:
        print(f"{file}: the rank of {'each target' if several else 'the target'} of each user")
    return {
        "split": split,
        "users": len(judge),
        "targets": len(judge.targets),
        "metrics": rows,
        "by_length": groups,
        "lists": lists,
        "protocol": dataclasses.asdict(recipe.evaluation),
    }


def _lists(judge: NextItemJudge, model, group) -> dict:
    k, counts = max(judge.protocol.cutoffs), judge.dataset.item_counts("train")
    found = list_metrics(judge.lists(model, k, group), counts)
    print(
        f"lists of {k}: {100 * found['coverage']:.1f} % of the items are in some list, novelty"
        f" {found['novelty']:.2f} bits"
    )
    return {"k": k, **found}


def _ranks_table(judge: NextItemJudge, ranks: Tensor):
    users, items = judge.dataset.user_ids(), judge.dataset.item_ids()
    return _table(users[judge.users[judge.owner].numpy()], items[judge.targets.numpy()], ranks)


def _table(users, items, ranks: Tensor):
    import polars

    return polars.DataFrame({"user_id": users, "item_id": items, "rank": ranks.numpy()})


def _cold_start(
    dataset,
    recipe: Recipe,
    stage: Stage,
    model: UserModel,
    folder: Path,
    split: str,
    file: Path | None,
    group,
) -> dict:
    _check_rows(model, recipe.cold_items, folder)
    rows = ColdRows(dataset)
    parts = rows.split(recipe.cold_items)
    objective, _ = _trained(stage.parts, model, cold_side(rows, recipe), folder)
    judge = ColdStartJudge(rows, parts[split], parts["train"], recipe.evaluation.cutoffs)
    ranks = _all_scores(judge, model, objective, group)
    metrics = {
        "popularity": judge.metrics(judge.popularity_ranks()),
        "model": judge.metrics(ranks),
    }
    if file is not None:
        users = dataset.user_ids()[rows.owners[judge.chosen].numpy()]
        items = rows.ids[rows.items[judge.chosen].numpy()]
        write_table(_table(users, items, ranks), file, overwrite=True)
    print(
        f"{len(judge):,} rows of cold start, split {split}, the item of each ranked among all"
        f" {rows.num_cold_items:,} of the other catalogue; HR@k is Recall@k"
    )
    print_metrics(metrics)
    if file is not None:
        print(f"{file}: the rank of the item of each row")
    size = {"rows": len(judge), "items": rows.num_cold_items}
    return {"split": split, **size, "metrics": metrics}


def _check_rows(model: UserModel, asked: ColdItems, folder: Path) -> None:
    """Raise ValueError where a model was trained on another split of the rows: it would be tested
    on some that it has seen."""
    if model.recipe is None or "cold_items" not in model.recipe:
        return
    trained = from_values(ColdItems, model.recipe["cold_items"], "cold_items")
    if trained.held_out != asked.held_out:
        raise ValueError(
            f"{folder} was trained on rows split by {trained.held_out}, not {asked.held_out}: it"
            " would be tested on rows that it has seen"
        )


def _vectors(
    dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path, split: str, group
) -> dict:
    judge = VectorsJudge(dataset, select_users(dataset, recipe.users, split), split)
    side, only = side_data(dataset, recipe), [*stage.parts]  # a pool may have parameters
    objective, _ = _trained(stage.parts, model, side, folder, only)
    rows = {"model": judge.metrics(_all_scores(judge, model, objective, group))}
    print(f"vectors of {len(judge):,} users, each with two dropouts, split {split}")
    print_metrics(rows, scale=1, digits=4)
    return {"split": split, "users": len(judge), "metrics": rows}


def _rating(
    dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path, split: str, group
) -> dict:
    chosen = select_users(dataset, recipe.users, split)
    trained = trained_users(dataset, recipe.users)
    judge = RatingJudge(dataset, chosen, split, trained)
    objective, _ = _trained(stage.parts, model, side_data(dataset, recipe), folder)
    rows = {
        "constant": judge.metrics(judge.constant),
        "biases of items and users": judge.metrics(judge.biases),
        "model": judge.metrics(_all_scores(judge, model, objective, group)),
    }
    low, high = judge.range
    print(
        f"{len(judge.ratings):,} ratings of {len(judge):,} users, split {split}, predictions"
        f" clipped to [{low:g}, {high:g}]"
    )
    print_metrics(rows, scale=1, digits=4)
    return {"split": split, "users": len(judge), "ratings": len(judge.ratings), "metrics": rows}


def _click(
    dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path, split: str, group
) -> dict:
    chosen = select_users(dataset, recipe.users, split)
    trained = trained_users(dataset, recipe.users)
    judge = ClickJudge(dataset, chosen, split, recipe.evaluation, stage.least_click, trained)
    objective, _ = _trained(stage.parts, model, side_data(dataset, recipe), folder)
    given = judge.least is not None
    rows = {
        "share of clicks of the item" if given else "popularity": judge.metrics(judge.baseline),
        "model": judge.metrics(_all_scores(judge, model, objective, group)),
    }
    clicks = int(judge.labels.sum())
    what = f"rated from {judge.least:g} on" if given else "held out, the others drawn"
    print(
        f"{len(judge.labels):,} items of {len(judge):,} users, split {split}, {clicks:,} clicks"
        f" ({what})"
    )
    print_metrics(rows, scale=1, digits=4)
    size = {"users": len(judge), "pairs": len(judge.labels), "clicks": clicks}
    return {"split": split, **size, "metrics": rows}


def _attributes(
    dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path, split: str, group
) -> dict:
    users, side = held_out_users(dataset, recipe.users), side_data(dataset, recipe)
    scales = saved_scales(folder).get("user_attributes")
    if not scales:
        raise ValueError(f"{folder / HEADS} holds no user_attributes: it was trained otherwise")
    pool = from_values(Pooling, scales[0]["pool"], "the pool of user_attributes")
    settings = UserAttributes(pool=pool, hidden=scales[0].get("hidden", 0))
    objective, _ = _trained({"user_attributes": settings}, model, side, folder)
    trained = select_users(dataset, recipe.users, "train")
    judge = AttributesJudge(dataset, users, "all", side.encoded, trained)
    rows = {
        "constant": judge.metrics(judge.baseline()),
        "model": judge.metrics(_all_scores(judge, model, objective, group)),
    }
    print(f"{len(users)} held-out users, {len(side.encoded)} attributes")
    print_metrics(rows, scale=1, digits=4)
    return {"users": len(users), "metrics": rows}


def _friends(
    dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path, split: str, group
) -> dict:
    users, evaluation = held_out_users(dataset, recipe.users), recipe.evaluation
    others = evaluation.other_friends
    judge = FriendsJudge(dataset, users, "all", others, evaluation.seed)
    parts = {"friends": stage.parts.get("friends", Friends())}
    objective, taken = _trained(parts, model, side_data(dataset, recipe), folder, ["friends"])
    rows = {
        "shared items (Sim)": judge.shared_items(),
        "model": judge.metrics(_all_scores(judge, model, objective, group), objective),
    }
    pairs = len(judge.queries)
    deviation = 100 * (rows["model"]["accuracy"] * (1 - rows["model"]["accuracy"]) / pairs) ** 0.5
    print(f"{pairs} pairs of held-out users, 1 friend and {others} others")
    print(
        "similarity: "
        + ("trained weights" if taken else f"equal weights, {folder / HEADS} has none")
    )
    print_metrics(rows)
    print(f"standard error of the model's accuracy: {deviation:.2f}")
    return {"pairs": pairs, "trained_similarity": bool(taken), "metrics": rows}


def _trained(
    parts: dict, model: UserModel, side: SideData, folder: Path, only: list[str] | None = None
) -> tuple[JointObjective, list[str]]:
    """(objectives with what `load_heads` reads, where the model is; the names of the tensors)."""
    objective = JointObjective(parts, model, side)
    taken = load_heads(objective, folder, only)
    return objective.to(model.device), taken


def _all_scores(judge, model: UserModel, objective: JointObjective, group) -> Tensor:
    return scores_of(len(judge), lambda rows: judge.score(model, objective, rows), group)
