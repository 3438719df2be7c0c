# SPDX-License-Identifier: Apache-2.0
"""What a stage trains, put together: a model, the objectives, and the batches that they see."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastrec.data.loader import SequenceLoader
from fastrec.data.views import Views
from fastrec.evaluation.next_item import check_model
from fastrec.nn.text_model import TextModel
from fastrec.nn.transfer import PARTS
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.training.checks import check_views
from fastrec.training.config import Recipe
from fastrec.training.heads_file import load_heads, load_pool
from fastrec.training.processes import Processes
from fastrec.training.rows import Tables, check_tables, use_rows
from fastrec.training.stage import Stage
from fastrec.training.stage_data import StageData, stage_data
from fastrec.training.start import (
    check_dtype,
    filler_of,
    similar_of,
    started_model,
    with_causal,
)


class Assembled(NamedTuple):
    """What a run trains, on what, and what asks it. taken: tensors of the model it starts from."""

    trained: UserModel
    objective: JointObjective
    loader: SequenceLoader
    data: StageData
    taken: list[str]


def check_arguments(dataset, model, **lists) -> None:
    """Raise TypeError for what stands in the place of something else in a call of `fit`."""
    if isinstance(dataset, str | Path):
        raise TypeError(
            f"expected a SequenceDataset, got {str(dataset)!r}: SequenceDataset.load reads it"
        )
    if isinstance(model, Recipe):
        raise TypeError("model is a Recipe: fit(dataset, recipe=..) trains a new model")
    check_model(model)
    for name, given in lists.items():
        if not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list, got {type(given).__name__}")


def assembled(
    dataset,
    recipe: Recipe,
    current: Stage,
    given: UserModel | TextModel | None,
    initial_folder: Path | None,
    where: Processes,
) -> Assembled:
    """Raises ValueError for what cannot be trained; no step is done and nothing is written."""
    initial = given.model if isinstance(given, TextModel) else given
    config = with_causal(recipe.model, current.init.causal)
    torch.manual_seed(recipe.seed)
    trained, taken = started_model(dataset, config, initial, current.init)
    check_dtype(trained, "a new model")
    if recipe.texts is not None:
        trained.texts, trained.tokenizer = recipe.texts, dataset.tokenizer
    data = stage_data(dataset, recipe, current)
    data.side.filler = filler_of(dataset, recipe, current)
    data.side.similar = similar_of(dataset, recipe, current)
    check_views(current, trained.config.dropout)
    objective = JointObjective(current.parts, trained, data.side, current.backend)
    if not any(part.requires_grad for m in (trained, objective) for part in m.parameters()):
        raise ValueError(f"nothing is left to train: init.freeze is {current.init.freeze}")
    _use_tables(current, trained, objective, where)
    heads = [name for name in current.init.take if name not in PARTS]
    if given is not None and initial_folder is None and (heads or current.init.pool is not None):
        what = f"init.pool: {current.init.pool}" if current.init.pool else f"init.take: {heads}"
        raise ValueError(f"{what} needs initial_folder, the folder of the model with its heads")
    if initial_folder is not None:
        taken += load_heads(objective, initial_folder, only=heads)
        if current.init.pool is not None:
            taken += load_pool(objective, initial_folder, current.init.pool)
    views = Views(current.views, trained.frame, data.side, recipe.model.max_len)
    loader = SequenceLoader(
        views,
        batch_size=current.batch_size,
        seed=recipe.seed,
        users=data.users,
        steps_per_pass=current.pass_steps,
    )
    objective.check_users(loader.smallest, loader.largest)
    sample = loader.few(2)
    if where.device.type == "cpu":  # parts of one's own may run on a GPU alone
        objective.rehearse(trained, sample)
    return Assembled(trained, objective, loader, data, taken)


def _use_tables(
    current: Stage, trained: UserModel, objective: JointObjective, where: Processes
) -> None:
    """Update the item table as `tables` of the stage says, or raise ValueError."""
    if current.tables != Tables() and current.cuda_graph:
        raise ValueError("cuda_graph needs tables.update: dense, and no tables.shard")
    check_tables(current.tables, trained, objective.parts.values())
    if current.tables.update != "rows":
        return
    use_rows(trained, objective.parts.values())
    if trained.item_head.pending is not None and (
        where.total > 1 or current.gradient_clip or current.precision != "32-true"
    ):
        raise ValueError(
            "tables.update: rows with a loss over all items needs one process, gradient_clip 0,"
            " whose norm would be that of a gradient that is never stored, and precision 32-true"
        )
