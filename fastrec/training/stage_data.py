# SPDX-License-Identifier: Apache-2.0
"""Whom a stage trains on and what judges it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrec.data.cold_items import ColdRows
from fastrec.data.side import SideData
from fastrec.evaluation.attributes import AttributesJudge
from fastrec.evaluation.click import ClickJudge
from fastrec.evaluation.cold_start import ColdStartJudge
from fastrec.evaluation.friends import FriendsJudge
from fastrec.evaluation.judges import Judge
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.rating import RatingJudge
from fastrec.evaluation.texts import TextJudge
from fastrec.evaluation.vectors import VectorsJudge
from fastrec.training.config import Recipe, Users
from fastrec.training.stage import Stage


@dataclass(frozen=True)
class StageData:
    """users: int64, that are trained, ascending; of cold start rows, see `ColdRows`. side: what
    steps and objectives may know of them. judge: of the validation."""

    users: Tensor
    side: SideData
    judge: Judge

    @property
    def people(self) -> Tensor:
        """int64: the users of the data set that are trained, ascending."""
        rows = self.side.dataset
        return rows.owners[self.users].unique() if isinstance(rows, ColdRows) else self.users

    def __str__(self) -> str:
        rows = f"{len(self.users):,} rows of " if len(self.users) != len(self.people) else ""
        return f"{rows}{len(self.people):,} users"


def select_users(dataset, users: Users, split: str | None = None) -> Tensor:
    """int64: the evaluated users, a random `fraction` of those in "valid" or "test", ascending.

    split: only those of them who are in it. In leave-one-out all are in every split.
    """
    chosen = _evaluated(dataset)
    if users.fraction < 1.0:
        generator = torch.Generator().manual_seed(users.seed)
        count = round(len(chosen) * users.fraction)
        order = torch.randperm(len(chosen), generator=generator, device="cpu")
        chosen = chosen[order[:count]].sort().values
    if split is None:
        return chosen
    return chosen[torch.isin(chosen, torch.as_tensor(dataset.users(split), device="cpu"))]


def trained_users(dataset, users: Users) -> Tensor:
    """int64: the selected users with training events, together with those whose sequences are too
    short to hold anything out, ascending."""
    short = np.setdiff1d(dataset.users("train"), _evaluated(dataset).numpy())
    whole = [select_users(dataset, users, "train"), torch.as_tensor(short, device="cpu")]
    return torch.cat(whole).sort().values


def held_out_users(dataset, users: Users) -> Tensor:
    """int64: the users in "valid" or "test" that `select_users` leaves out, ascending. They test
    the judges "attributes" and "friends"."""
    everyone = _evaluated(dataset)
    rest = everyone[~torch.isin(everyone, select_users(dataset, users))]
    if len(rest) == 0:
        raise ValueError(f"users.fraction is {users.fraction}: no user is held out to test on")
    return rest


def _evaluated(dataset) -> Tensor:
    found = np.union1d(dataset.users("valid"), dataset.users("test"))
    return torch.as_tensor(found, device="cpu")


def _validation_users(selected: Tensor, users: Users, count: int) -> Tensor:
    """`count` random users, ascending, to choose a model by."""
    generator = torch.Generator().manual_seed(users.seed + 1)
    order = torch.randperm(len(selected), generator=generator, device="cpu")
    return selected[order[:count]].sort().values


def side_data(dataset, recipe: Recipe, labelled: Tensor | None = None) -> SideData:
    """Side data whose attributes are standardised and classed by the trained users."""
    return SideData(
        dataset,
        attributes=recipe.attributes,
        users=select_users(dataset, recipe.users, "train"),
        labelled=labelled,
        event_columns=recipe.model.event_columns,
    )


def stage_data(dataset, recipe: Recipe, stage: Stage) -> StageData:
    """Users, side data and judge of a stage.

    The judges of the next item, of texts, of ratings and of clicks are asked about all selected
    users with a validation target, or `validate_users` of them, that of vectors about some, and all
    `trained_users` are trained on. The judges of attributes and friends are asked about a random
    tenth of the selected users, who are not trained on. Where users are held out to test these, the
    attributes and friends of that tenth are hidden from every stage: a model that remembered them
    would be chosen for it.

    Cold start trains and judges rows of all users, whatever the recipe says of `users`.
    """
    if stage.judge == "cold_start":
        return _cold_data(dataset, recipe)
    selected = select_users(dataset, recipe.users, "valid")
    if len(selected) == 0:
        what = "3 events or more"
        if dataset.splits is not None:
            what = "a validation target and an event before it"
        of = "" if recipe.users.fraction >= 1 else f" of users.fraction {recipe.users.fraction}"
        raise ValueError(f"no user{of} has {what}: there is nothing to validate on")
    chosen = select_users(dataset, recipe.users, "train")
    tenth = _validation_users(chosen, recipe.users, max(1, len(chosen) // 10))
    users = labelled = trained_users(dataset, recipe.users)
    if stage.judge_kind.held_out or recipe.users.fraction < 1.0:
        labelled = users[~torch.isin(users, tenth)]
    if stage.judge_kind.held_out:
        users = labelled
    if stage.validate_users is not None:
        selected = _validation_users(selected, recipe.users, stage.validate_users)
    side = side_data(dataset, recipe, labelled)
    side.event_columns = stage.event_columns(recipe.model.event_columns)
    asked = tenth if stage.judge_kind.held_out else selected
    return StageData(users, side, _judge(dataset, recipe, stage, asked, users, side))


def _judge(
    dataset, recipe: Recipe, stage: Stage, asked: Tensor, trained: Tensor, side: SideData
) -> Judge:
    """The judge of a stage, but for cold start. asked, trained: int64, users."""
    how = recipe.evaluation
    match stage.judge:
        case "next_item":
            return NextItemJudge(dataset, asked, "valid", how)
        case "texts":
            return TextJudge(dataset, asked, "valid", how)
        case "vectors":
            return VectorsJudge(dataset, asked, "valid")
        case "rating":
            return RatingJudge(dataset, asked, "valid", trained)
        case "click":
            return ClickJudge(dataset, asked, "valid", how, stage.least_click, trained)
        case "attributes":
            return AttributesJudge(dataset, asked, "train", side.encoded, trained)
        case "friends":
            return FriendsJudge(dataset, asked, "train", how.other_friends, how.seed)
    raise AssertionError(f"{stage.judge} is no judge of users")


def cold_side(rows: ColdRows, recipe: Recipe) -> SideData:
    """Side data of cold-start rows: the whole history of a user is the input."""
    return SideData(rows, "all", event_columns=recipe.model.event_columns)


def _cold_data(dataset, recipe: Recipe) -> StageData:
    rows = ColdRows(dataset)
    parts = rows.split(recipe.cold_items)
    judge = ColdStartJudge(rows, parts["valid"], parts["train"], recipe.evaluation.cutoffs)
    return StageData(parts["train"], cold_side(rows, recipe), judge)
