"""What a stage trains on and is judged by: next item, user profile or social relation."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastrec.data.attributes import EncodedAttribute, encode_attributes, profile_ids
from fastrec.data.errors import DataError
from fastrec.data.relations import FriendSampler, SocialGraph
from fastrec.evaluation.profile import ProfileEvaluator
from fastrec.evaluation.protocols import Evaluator
from fastrec.evaluation.relation import RelationEvaluator
from fastrec.training.config import Objectives, Recipe

Task = Literal["recommendation", "profile", "relation"]


@dataclass(frozen=True)
class TaskData:
    """users: that are trained, ascending. evaluator: of the validation, see `StageModule`.
    attributes, friends: what the objectives of the stage ask of the loader."""

    users: Tensor
    evaluator: Evaluator | ProfileEvaluator | RelationEvaluator
    attributes: list[EncodedAttribute]
    friends: FriendSampler | None


def select_users(dataset, recipe: Recipe) -> Tensor:
    """int64: the evaluated users, a random `fraction` of those with a test target, ascending."""
    users = torch.as_tensor(dataset.users("test"))
    if recipe.users.fraction >= 1.0:
        return users
    generator = torch.Generator().manual_seed(recipe.users.seed)
    count = round(len(users) * recipe.users.fraction)
    return users[torch.randperm(len(users), generator=generator)[:count]].sort().values


def held_out_users(dataset, recipe: Recipe) -> Tensor:
    """int64: the users with a test target that `select_users` leaves out, ascending. They test
    user profile prediction and social relation detection."""
    users = torch.as_tensor(dataset.users("test"))
    rest = users[~torch.isin(users, select_users(dataset, recipe))]
    if len(rest) == 0:
        raise ValueError(
            f"users.fraction is {recipe.users.fraction}: no user is held out to test on"
        )
    return rest


def _validation_users(users: Tensor, recipe: Recipe) -> Tensor:
    """A random tenth of the training users, ascending, to choose a model by."""
    generator = torch.Generator().manual_seed(recipe.users.seed + 1)
    count = max(1, len(users) // 10)
    return users[torch.randperm(len(users), generator=generator)[:count]].sort().values


def encoded_attributes(dataset, recipe: Recipe) -> list[EncodedAttribute]:
    """The attributes of the recipe, standardised and classed by the trained users."""
    return encode_attributes(dataset, recipe.attributes, select_users(dataset, recipe))


def task_data(dataset, recipe: Recipe, objectives: Objectives, task: Task) -> TaskData:
    """Users, validation and side data of a stage.

    Recommendation trains all selected users, and those whose sequences are too short to hold
    anything out, and is validated on the second last items of the former. Profile and relation
    leave a random tenth of the selected users out of the training and are validated on it. Where
    users are held out to test these tasks, recommendation sees neither attributes nor friends of
    that tenth either: a model that remembered them would be chosen for it.
    """
    selected = users = labelled = select_users(dataset, recipe)
    if len(selected) == 0:
        raise ValueError("no user has 3 events or more: there is nothing to validate on")
    judged = _validation_users(users, recipe)
    if task != "recommendation" or recipe.users.fraction < 1.0:
        labelled = users[~torch.isin(users, judged)]
    if task == "recommendation":
        short = torch.as_tensor(np.setdiff1d(dataset.users("train"), dataset.users("test")))
        users, labelled = (torch.cat([part, short]).sort().values for part in (users, labelled))
    social, attributes = recipe.social, []
    described = bool(recipe.attributes) or len(dataset.user_attributes().columns) > 2
    wants_profile = bool(objectives.social_relation) and social.same_profile and described
    if objectives.user_attribute or wants_profile:
        try:
            attributes = encoded_attributes(dataset, recipe)
        except DataError as error:
            if objectives.user_attribute or recipe.attributes:
                raise
            raise ValueError(
                f"{error}. Friends are compared by all columns of users: list `attributes`, or set"
                " social.same_profile to false"
            ) from error
    evaluator: Evaluator | ProfileEvaluator | RelationEvaluator
    if task == "recommendation":
        evaluator = Evaluator(dataset, selected, "valid", recipe.evaluation)
    else:
        users = labelled
        if task == "profile":
            evaluator = ProfileEvaluator(dataset, judged, "train", attributes, users)
        else:
            evaluator = RelationEvaluator(dataset, judged, "train", social.negatives, social.seed)
    friends = None
    if objectives.social_relation:
        graph = SocialGraph.from_dataset(dataset, labelled)
        if len(graph.values) == 0:
            raise ValueError(f"no two of the {len(labelled)} trained users are friends")
        friends = FriendSampler(
            graph, social.hops, profile_ids(attributes) if wants_profile else None
        )
    if not objectives.user_attribute:
        attributes = []
    hidden = users[~torch.isin(users, labelled)]
    return TaskData(users, evaluator, [part.without(hidden) for part in attributes], friends)
