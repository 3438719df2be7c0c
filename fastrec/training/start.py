# SPDX-License-Identifier: Apache-2.0
"""What a stage starts with: a model, new or from another run, and whom that one has seen."""

import copy
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastrec.data.item_categories import Categories, item_categories
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.model_config import ModelConfig, parameters
from fastrec.nn.transfer import PARTS, freeze, take
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Init, Recipe, Stage
from fastrec.training.model_folder import seen_users
from fastrec.training.stage_data import select_users


def started_model(
    dataset, config: ModelConfig, initial: UserModel | None, init: Init
) -> tuple[UserModel, list[str]]:
    """The model that a stage trains, and the names of the tensors that `initial` gave it."""
    config.items.check_events(
        {name: dataset.event_column(name) for name in config.items.event_columns}
    )
    same = init.users == "same"
    if initial is not None and {"items", "head"} & set(init.take):
        initial.check_items(dataset)
    whole = set(PARTS) <= set(init.take) and not init.patch
    if initial is not None:
        if same and "head" in init.take:
            initial.check_users(dataset)
        whole &= same or not initial.num_users
        whole &= initial.config.causal == config.causal
    if initial is not None and whole and initial.num_items == dataset.num_items:
        model, taken = copy.deepcopy(initial), list(initial.state_dict())
    else:
        features = item_categories(dataset, config.items.most)
        _check_memory(dataset, config, features)
        model = UserModel(dataset.num_items, config, dataset.num_users, features)
        taken = [] if initial is None else take(model, initial, init.take, same)
    freeze(model, init.freeze)
    return model, taken


def seen_by_run(
    dataset,
    users: torch.Tensor,
    recipe: Recipe,
    stage: Stage,
    initial: UserModel | None,
    initial_folder: Path | None,
    kept: Path | None,
) -> np.ndarray | None:
    """Whom a model that is trained on `users` has seen, see `seen_users`. `kept`: of a resumed run,
    the best model so far; it knows what `initial` had seen, which a resumed run may not say."""
    selected = select_users(dataset, recipe.users)
    everyone = torch.cat([users, selected]).unique()
    earlier: list[Path | None] = []
    if kept is not None and kept.exists():
        earlier.append(kept)
    elif initial is not None and stage.init.users == "same":
        earlier.append(initial_folder)
    return seen_users(dataset, everyone, earlier)


def _check_memory(dataset, config: ModelConfig, features: Mapping[str, Categories]) -> None:
    classes = {name: categories.classes for name, categories in features.items()}
    size = 4 * (parameters(dataset.num_items, config, dataset.num_users, classes) or 0)
    if size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(
            f"the weights of the model are {size / 1e9:,.1f} GB, this machine has"
            f" {memory / 1e9:,.1f} GB of memory: smaller model.* is needed"
        )


def with_causal(config: ModelConfig, causal: bool | None) -> ModelConfig:
    """The same model with an encoder that is causal, or is not: its weights are the same. None: as
    it is."""
    if causal is None:
        return config
    encoder = settings_of(config.encoder)
    if "causal" not in {f.name for f in dataclasses.fields(encoder)}:
        raise ValueError(f"init.causal: {type(encoder).__name__} is causal or not by its nature")
    return dataclasses.replace(config, encoder=dataclasses.replace(encoder, causal=causal))


def with_model(recipe: Recipe, initial: UserModel, init: Init) -> Recipe:
    """The recipe with the settings of the model that a stage starts from, and a warning if they
    differ."""
    config = initial.config
    if init.causal is not None:  # what the recipe says holds for its other stages
        config = with_causal(config, recipe.model.causal)
    if recipe.model != config and recipe.model != ModelConfig():
        asked, kept = dataclasses.asdict(recipe.model), dataclasses.asdict(config)
        other = [f"{n} {kept[n]!r}, not {asked[n]!r}" for n in kept if kept[n] != asked[n]]
        warnings.warn(
            f"the model to start from keeps its own settings: {', '.join(other)}", stacklevel=4
        )
    if init.patch:
        encoder = settings_of(config.encoder)
        if not hasattr(encoder, "patch"):
            raise ValueError(f"init.patch: {type(encoder).__name__} has no model patches")
        config = dataclasses.replace(config, encoder=dataclasses.replace(encoder, patch=init.patch))
    return dataclasses.replace(recipe, model=config)
