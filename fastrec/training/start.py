# SPDX-License-Identifier: Apache-2.0
"""What a stage starts with: a model, new or from another run, and whom that one has seen."""

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastrec.data.item_categories import Categories
from fastrec.data.item_texts import TextData, Texts
from fastrec.data.similar_items import most_similar
from fastrec.evaluation.next_item import check_scores
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.filler import Filler
from fastrec.nn.items import ItemFeatures, item_features
from fastrec.nn.model_config import ModelConfig, num_parameters
from fastrec.nn.model_files import TOKENIZER, checked
from fastrec.nn.similar import SimilarItems
from fastrec.nn.text_model import TextModel
from fastrec.nn.transfer import WHOLE, freeze, take
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item, ItemPrediction
from fastrec.training.checks import check_stage
from fastrec.training.config import Recipe
from fastrec.training.model_folder import load_model, read_seen, read_trained_on, seen_users
from fastrec.training.stage import Init, Stage
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
    whole = set(init.take) >= WHOLE and not init.patch
    whole &= initial is not None and initial.config.dropout == config.dropout
    if initial is not None:
        if same and {"head", "users"} & set(init.take):
            initial.check_users(dataset)
        whole &= same or not initial.num_users
        whole &= initial.config.causal == config.causal
    if initial is not None and whole and initial.num_items == dataset.num_items:
        model, taken = copy.deepcopy(initial), list(initial.state_dict())
    else:
        features = item_features(dataset, config.items)
        _check_memory(dataset, config, features)
        model = UserModel(dataset.num_items, config, dataset.num_users, features)
        if init.ids:  # the model starts as it was
            with torch.no_grad():
                model.item_embedding.weight[: dataset.num_items].zero_()
        taken = [] if initial is None else take(model, initial, init.take, same)
        if initial is not None:
            frozen = {n for n, part in initial.named_parameters() if not part.requires_grad}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not (name in taken and name in frozen))
    freeze(model, init.freeze, init.second_norm)
    return model, taken


def scores_items(stage: Stage, initial: UserModel | None, kept: Path | None) -> bool:
    """Whether what scores the items of a model is trained: by the stage, or by what it starts from.
    What objectives of somebody else train is what is asked, unless the last model is kept.
    `kept`: see `seen_by_run`."""
    parts = stage.parts.values()
    asked = stage.judge_kind.next_item and stage.monitored != "steps"
    others = not all(type(part).__module__.startswith("fastrec.") for part in parts)
    if any(map(_of_items, parts)) or (asked and others):
        return True
    if kept is not None and kept.exists():
        return read_trained_on(kept).get("scores_items", True)
    if initial is None or "items" not in stage.init.take:
        return False
    return initial.trained_on.get("scores_items", True)


def _of_items(part) -> bool:
    return isinstance(part, Item | ItemPrediction)


def with_texts(recipe: Recipe, initial: UserModel | None) -> Recipe:
    """The recipe with the settings of texts of the model that a stage starts from, and a warning if
    they differ."""
    if recipe.texts is None or initial is None or initial.texts is None:
        return recipe
    warn_of_settings(recipe.texts, initial.texts, "texts")
    return dataclasses.replace(recipe, texts=initial.texts)


def text_data(
    dataset, texts: Texts, initial: UserModel | None, kept: Path | None = None
) -> TextData:
    """A data set as tokens, by the tokenizer of the model that a stage starts from. `kept`: of a
    resumed run, the best model so far, which has it too."""
    tokenizer = None if initial is None else initial.tokenizer
    if initial is not None and tokenizer is None:
        raise ValueError("texts: the model to start from reads items, it has no tokenizer")
    if tokenizer is None and kept is not None and (kept / TOKENIZER).is_file():
        tokenizer = checked(kept, TOKENIZER).read_text(encoding="utf-8")
    return TextData(dataset, texts, tokenizer)


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
    earlier: list[np.ndarray | None] = []
    if kept is not None and kept.exists():
        earlier.append(read_seen(kept))
    elif initial is not None and stage.init.users == "same":
        known = initial.seen_users
        if known is None and initial_folder is not None:
            known = read_seen(initial_folder)
        earlier.append(known)
    asked = [each for each in (stage.filler, _similar(stage)) if each is not None]
    earlier += [read_seen(Path(each)) for each in asked]
    return seen_users(dataset, everyone, earlier)


def filler_of(dataset, recipe: Recipe, stage: Stage) -> Filler | None:
    """What fills the views of a stage; None where no view has the step `fill`. Raises ValueError
    where the stage names no model, or one that cannot be asked about the data set."""
    if not stage.fills:
        return None
    if stage.filler is None:
        raise ValueError(
            "the step fill draws from a masked-item model: the key filler of the stage is its"
            " folder (--pretraining.filler RUN/model)"
        )
    model = load_model(stage.filler, dataset, recipe.users, same_users=False)
    if isinstance(model, TextModel):
        raise ValueError(f"{stage.filler} reads the texts of items: it predicts no items")
    _check_lent(stage.filler, model)
    there = stage.event_columns(recipe.model.event_columns)
    if missing := [name for name in model.event_columns if name not in there]:
        raise ValueError(
            f"filler {stage.filler} reads {missing[0]}, which no part of this stage does"
        )
    return Filler(model)


def similar_of(dataset, recipe: Recipe, stage: Stage) -> Callable[..., torch.Tensor]:
    """What says which items are similar in a stage, see `SideData.similar`. Raises ValueError for a
    model that cannot be asked about the items of the data set."""
    if stage.similar is None:
        return most_similar
    model = load_model(stage.similar.model, dataset, recipe.users, same_users=False)
    if isinstance(model, TextModel):
        raise ValueError(f"{stage.similar.model} reads the texts of items: they have no vectors")
    _check_lent(stage.similar.model, model)
    return SimilarItems(model, stage.similar.users)


def _check_lent(folder: str, model: UserModel) -> None:
    try:
        check_scores(model)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be asked about items: {error}") from error


def _similar(stage: Stage) -> str | None:
    return None if stage.similar is None else stage.similar.model


def _check_memory(dataset, config: ModelConfig, features: ItemFeatures) -> None:
    sizes = {
        name: part.classes if isinstance(part, Categories) else part.shape[1]
        for name, part in features.items()
    }
    size = 4 * (num_parameters(dataset.num_items, config, dataset.num_users, sizes) or 0)
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


def warn_of_settings(asks: ModelConfig | Texts, has: ModelConfig | Texts, name: str = "") -> None:
    """A warning where a model has other settings than a recipe asks for. name: of the settings."""
    other = _others(dataclasses.asdict(has), dataclasses.asdict(asks), name)
    if other:
        warnings.warn(f"the model keeps its own settings: {', '.join(other)}", stacklevel=5)


def _others(has, asks, name: str = "") -> list[str]:
    if isinstance(has, dict) and isinstance(asks, dict):
        keys = [key for key in has if key in asks]
        return [text for k in keys for text in _others(has[k], asks[k], f"{name}.{k}".lstrip("."))]
    if has == asks:
        return []
    shown = ["given" if isinstance(value, dict) else repr(value) for value in (has, asks)]
    return [f"{name} {shown[0]}, not {shown[1]}"]


def with_model(
    recipe: Recipe, initial: UserModel, stage: Stage, name: str = "pretraining"
) -> Recipe:
    """The recipe with the settings of the model that a stage, called `name`, starts from, and a
    warning if they differ. The dropout of the stage is nothing that they differ in.

    Raises ValueError where the stage cannot start from that model, or another stage of the recipe
    could not train one with its settings.
    """
    config, init = with_dropout(initial.config, stage), stage.init
    if init.causal is not None:  # what the recipe says holds for its other stages
        config = with_causal(config, recipe.model.causal)
    if recipe.model != ModelConfig():
        warn_of_settings(with_dropout(recipe.model, stage), config)
    if init.ids:
        if config.items.ids:
            raise ValueError("init.ids has no effect: the model to start from has ids")
        items = dataclasses.replace(config.items, ids=True)
        config = dataclasses.replace(config, items=items)
    if init.patch:
        encoder = settings_of(config.encoder)
        if not hasattr(encoder, "patch"):
            raise ValueError(f"init.patch: {type(encoder).__name__} has no model patches")
        if encoder.patch and encoder.patch_form != init.patch_form:
            raise ValueError(
                f"init.patch_form is {init.patch_form}, the model to start from has patches that"
                f" are {encoder.patch_form}"
            )
        encoder = dataclasses.replace(encoder, patch=init.patch, patch_form=init.patch_form)
        config = dataclasses.replace(config, encoder=encoder)
    check_stage(name, stage, config)  # this stage before the others
    try:
        return dataclasses.replace(recipe, model=config)
    except ValueError as error:
        raise ValueError(f"the recipe is for other models, in its {error}") from error


def with_dropout(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The settings of a model in a stage."""
    return config if stage.dropout is None else dataclasses.replace(config, dropout=stage.dropout)


def check_dtype(model: UserModel, what: str) -> None:
    """Raise ValueError for numbers that a stage does not train."""
    dtype = model.item_embedding.weight.dtype
    if dtype != torch.float32:
        raise ValueError(
            f"{what} has numbers of {dtype}, and a stage trains float32 (its precision:"
            " bf16-mixed multiplies lower ones): model.float(), or torch.set_default_dtype"
        )
