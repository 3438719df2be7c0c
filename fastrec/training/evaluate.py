# SPDX-License-Identifier: Apache-2.0
"""A trained model as the judge of a stage sees it, printed beside a baseline."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastrec.data.output import write_table
from fastrec.data.settings import from_values
from fastrec.evaluation.attributes import AttributesJudge
from fastrec.evaluation.friends import FriendsJudge
from fastrec.evaluation.metrics import length_groups, list_metrics
from fastrec.evaluation.next_item import NextItemJudge, row_blocks
from fastrec.evaluation.report import print_metrics
from fastrec.nn.model_files import HEADS
from fastrec.nn.pool import Pooling
from fastrec.nn.user_model import UserModel
from fastrec.objectives.friends import Friends
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.config import Recipe, Stage
from fastrec.training.model_folder import load_heads, saved_scales
from fastrec.training.stage_data import held_out_users, select_users, side_data


def evaluate_stage(
    dataset,
    recipe: Recipe,
    stage: Stage,
    model: UserModel,
    folder: Path,
    split: str = "test",
    ranks: Path | None = None,
) -> dict:
    """Print and return the metrics of the test users of a stage.

    folder: of the model, with the parameters of its objectives.
    split, ranks: for the judge of the next item: which items are held out, and a .csv or .parquet
        file for user_id, item_id (the target) and rank, a row for each target.
    """
    if stage.judge == "next_item":
        return _next_item(dataset, recipe, model, split, ranks)
    if ranks is not None:
        raise ValueError(f"--ranks has no effect: this stage judges {stage.judge}")
    if stage.judge == "attributes":
        return _attributes(dataset, recipe, model, folder)
    return _friends(dataset, recipe, stage, model, folder)


def _next_item(dataset, recipe: Recipe, model: UserModel, split: str, file: Path | None) -> dict:
    chosen = select_users(dataset, recipe.users, split)
    judge = NextItemJudge(dataset, chosen, split, recipe.evaluation)
    ranks = judge.ranks(model)
    rows = {
        "popularity": judge.metrics(judge.popularity_ranks()),
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
    lists = _lists(judge, model) if recipe.evaluation.candidates == "full" else {}
    if file is not None:
        write_table(_ranks_table(judge, ranks), file, overwrite=True)
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


def _lists(judge: NextItemJudge, model: UserModel) -> dict:
    k, counts = max(judge.protocol.cutoffs), judge.dataset.item_counts("train")
    found = list_metrics(judge.lists(model, k), counts)
    print(
        f"lists of {k}: {100 * found['coverage']:.1f} % of the items are in some list, novelty"
        f" {found['novelty']:.2f} bits"
    )
    return {"k": k, **found}


def _ranks_table(judge: NextItemJudge, ranks: Tensor):
    import polars

    users, items = judge.dataset.user_ids(), judge.dataset.item_ids()
    columns = {
        "user_id": users[judge.users[judge.owner].numpy()],
        "item_id": items[judge.targets.numpy()],
        "rank": ranks.numpy(),
    }
    return polars.DataFrame(columns)


def _attributes(dataset, recipe: Recipe, model: UserModel, folder: Path) -> dict:
    users, side = held_out_users(dataset, recipe.users), side_data(dataset, recipe)
    scales = saved_scales(folder).get("user_attributes")
    if not scales:
        raise ValueError(f"{folder / HEADS} holds no user_attributes: it was trained otherwise")
    pool = from_values(Pooling, scales[0]["pool"], "the pool of user_attributes")
    settings = UserAttributes(pool=pool, hidden=scales[0].get("hidden", 0))
    objective = JointObjective({"user_attributes": settings}, model, side)
    load_heads(objective, folder)
    objective.to(model.item_table.device)
    trained = select_users(dataset, recipe.users, "train")
    judge = AttributesJudge(dataset, users, "all", side.encoded, trained)
    rows = {
        "constant": judge.metrics(judge.baseline()),
        "model": judge.metrics(_all_scores(judge, model, objective)),
    }
    print(f"{len(users)} held-out users, {len(side.encoded)} attributes")
    print_metrics(rows, scale=1, digits=4)
    return {"users": len(users), "metrics": rows}


def _friends(dataset, recipe: Recipe, stage: Stage, model: UserModel, folder: Path) -> dict:
    users, evaluation = held_out_users(dataset, recipe.users), recipe.evaluation
    others = evaluation.other_friends
    judge = FriendsJudge(dataset, users, "all", others, evaluation.seed)
    settings = stage.parts.get("friends", Friends())
    objective = JointObjective({"friends": settings}, model, side_data(dataset, recipe))
    taken = load_heads(objective, folder, only=["friends"])
    objective.to(model.item_table.device)
    rows = {
        "shared items (Sim)": judge.shared_items(),
        "model": judge.metrics(_all_scores(judge, model, objective), objective),
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


def _all_scores(judge, model: UserModel, objective: JointObjective) -> Tensor:
    blocks = row_blocks(len(judge))
    return torch.cat([judge.score(model, objective, rows) for rows in blocks])
