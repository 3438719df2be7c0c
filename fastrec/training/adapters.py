# SPDX-License-Identifier: Apache-2.0
"""What a task has trained beside a frozen encoder, saved without it: model patches and heads
(PeterRec, Yuan et al., 2020). Several of them stand beside one model.

adapter.json          width and form of the patches, the shapes of the tensors, a digest of what is
                      not saved: the tensors of the model that it belongs to
adapter.safetensors   patches, and of the item head what was trained
heads.safetensors, trained_on.json, users.npy, recipe.json   as beside a model; the users are those
                      whom the model has not seen
digests.json          a digest of each, written last
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastrec.data.output import check_only, locked, replaced_folder, write_json
from fastrec.data.settings import from_values
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.encoders.sublayers import check_patch
from fastrec.nn.items import unknown_features
from fastrec.nn.model_config import ModelConfig, described
from fastrec.nn.model_files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    DIGESTS,
    HEADS,
    NAMES,
    RECIPE,
    TRAINED_ON,
    USERS,
    check_like,
    checked,
    read_hashes,
    read_json,
    read_tensors,
    write_digests,
    write_hashes,
    write_tensors,
)
from fastrec.nn.text_model import TextModel
from fastrec.nn.user_model import UserModel

FORMAT = 1
M = TypeVar("M", UserModel, TextModel)


@dataclasses.dataclass(frozen=True)
class Told:
    """What adapter.json says.

    Attributes:
        format: of the folder.
        patch, patch_form: of the encoder.
        base: `shared_digest` of the model that it belongs to.
        tensors: shapes by name.
    """

    format: int
    patch: int
    patch_form: str
    base: str
    tensors: dict[str, list[int]]


def save_adapter(
    folder: Path | str, pretrained: Path | str, base: Path | str
) -> tuple[dict[str, list[int]], int]:
    """Write into `folder` what the model in `pretrained` has beside the one in `base`, which it was
    trained from with items and encoder frozen. An adapter that is there is replaced.

    Returns the shapes of the tensors by name, those of objectives included, and how many numbers
    model and objectives have together.

    Raises ValueError where the two differ in more than patches, second LayerNorms of blocks, item
    head and dropout, naming what, or in nothing; FileExistsError for a folder that holds something
    else.
    """
    folder, pretrained, base = Path(folder), Path(pretrained), Path(base)
    model, below = UserModel.from_pretrained(pretrained), UserModel.from_pretrained(base)
    tensors = _own(model, below, pretrained, base)
    heads = checked(pretrained, HEADS)
    trained = read_tensors(heads) if heads.is_file() else {}
    if not tensors and not trained:
        raise ValueError(f"{pretrained} has nothing that {base} has not")
    if folder.exists() and not (folder / ADAPTER).is_file():
        raise FileExistsError(f"{folder} is there, and holds no adapter")
    encoder = settings_of(model.config.encoder)
    kept = {name: part for name, part in below.state_dict().items() if name not in tensors}
    told = Told(
        FORMAT,
        getattr(encoder, "patch", 0),
        getattr(encoder, "patch_form", "serial"),
        shared_digest(kept),
        {name: list(part.shape) for name, part in tensors.items()},
    )
    if folder.exists():
        check_only(folder, lambda name: name in (*NAMES, ADAPTER, ADAPTER_WEIGHTS, DIGESTS))
    with locked(folder), replaced_folder(folder) as work:
        write_tensors(work / ADAPTER_WEIGHTS, tensors)
        write_json(work / ADAPTER, dataclasses.asdict(told))
        for name in (HEADS, TRAINED_ON, RECIPE):
            if checked(pretrained, name).is_file():
                shutil.copyfile(pretrained / name, work / name)
        here, there = (read_hashes(checked(each, USERS)) for each in (pretrained, base))
        if here is not None and there is not None:
            write_hashes(work / USERS, np.setdiff1d(here, there))
        write_digests(work)
    whole = sum(part.numel() for part in [*model.parameters(), *trained.values()])
    return told.tensors | {name: list(part.shape) for name, part in trained.items()}, whole


def with_adapter(model: M, folder: Path | str) -> M:
    """The model with what the adapter in `folder` has: another one that shares the memory
    of all other tensors with it, so that many tasks cost one item table and one encoder. Neither is
    to be trained: `fit` copies the model that it starts from.

    Raises ValueError for an adapter that belongs to another model; FileNotFoundError or ValueError
    that names the file for one that is missing or damaged.
    """
    if isinstance(model, TextModel):
        return TextModel(with_adapter(model.model, folder), model.texts)
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{folder / ADAPTER} is missing: {folder} holds no adapter")
    file = checked(folder, ADAPTER)
    try:
        told = from_values(Told, read_json(file), "adapter")
        if told.format != FORMAT:
            raise ValueError(f"unknown format {told.format}, expected {FORMAT}")
        check_patch(told.patch, told.patch_form)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    own = read_tensors(checked(folder, ADAPTER_WEIGHTS))
    below = model.state_dict()
    kept = {name: part for name, part in below.items() if name not in own}
    if shared_digest(kept) != told.base:
        raise ValueError(
            f"{folder} belongs to another model: its patches and heads were trained beside other"
            " weights of the encoder or of the items (for other items than it was trained on:"
            " load_model(FOLDER, dataset, adapter=..))"
        )
    made = _patched(model, told)
    # Copies: what was read is mapped from the file, which may be written over.
    given = kept | {name: part.to(model.device, copy=True) for name, part in own.items()}
    check_like(folder / ADAPTER_WEIGHTS, given, made.state_dict())
    made.load_state_dict(given, assign=True)
    made.texts, made.tokenizer = model.texts, model.tokenizer
    items = {name: model.trained_on[name] for name in ("items",) if name in model.trained_on}
    trained_on, recipe = (checked(folder, name) for name in (TRAINED_ON, RECIPE))
    made.trained_on = (read_json(trained_on) if trained_on.is_file() else {}) | items
    made.recipe = read_json(recipe) if recipe.is_file() else None
    more, made.known_items = read_hashes(checked(folder, USERS)), model.known_items
    if more is not None and model.seen_users is not None:
        made.seen_users = np.union1d(model.seen_users, more)
    return made


def shared_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bits, in whatever order; the same on every device."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        part = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {part.dtype} {list(part.shape)} ".encode())
        whole.update(part.view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _own(model: UserModel, below: UserModel, folder: Path, base: Path) -> dict[str, Tensor]:
    """The tensors of `model` that `below` has not, or has otherwise."""
    if model.num_items != below.num_items:
        raise ValueError(
            f"{folder} has {model.num_items:,} items, {base} {below.num_items:,}: an adapter is of"
            " the same items"
        )
    here, there = (_without_patches(each.config) for each in (model, below))
    for name in here:
        if here[name] != there.get(name):
            raise ValueError(
                f"model.{name} of {folder} is {here[name]}, that of {base} {there.get(name)}: an"
                " adapter has patches and heads alone"
            )
    second = {
        id(part)
        for module in model.encoder.modules()
        for part in getattr(module, "second_norm", torch.nn.Identity()).parameters()
    }
    may = {name for name, part in model.named_parameters() if id(part) in second}
    before, found = below.state_dict(), {}
    for name, part in model.state_dict().items():
        if name in before and torch.equal(part, before[name]):
            continue
        if ".patches." not in name and not name.startswith("item_head.") and name not in may:
            raise ValueError(
                f"{folder} was not trained beside the frozen weights of {base}: {name} is another"
                " one (init.freeze: [items, encoder] of its stage leaves them as they are)"
            )
        found[name] = part
    return found


def _without_patches(config: ModelConfig) -> dict:
    """Settings that a model has in common with its adapters."""
    values = described(dataclasses.replace(config, dropout=0.0))
    for part in values["encoder"].values():
        for name in ("patch", "patch_form"):
            if isinstance(part, dict):
                part.pop(name, None)
    return values


def _patched(model: UserModel, told: Told) -> UserModel:
    """A model without memory, whose encoder has the patches of an adapter."""
    config, encoder = model.config, settings_of(model.config.encoder)
    if hasattr(encoder, "patch"):
        encoder = dataclasses.replace(encoder, patch=told.patch, patch_form=told.patch_form)
        config = dataclasses.replace(config, encoder=encoder)
    elif told.patch:
        raise ValueError(f"{type(encoder).__name__} has no model patches, the adapter has")
    items = model.item_input
    features = unknown_features(config.items, model.num_items, items.classes | items.sizes)
    with torch.device("meta"):
        return UserModel(model.num_items, config, model.num_users, features)
