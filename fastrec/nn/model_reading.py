# SPDX-License-Identifier: Apache-2.0
"""A model read from its folder, and what is wrong with one that cannot be."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrec.data.item_texts import Texts
from fastrec.data.settings import from_values
from fastrec.nn.encoders.parts import Encoders
from fastrec.nn.items import unknown_features
from fastrec.nn.model_config import check_sizes, config_of, num_parameters
from fastrec.nn.model_files import (
    ADAPTER,
    CONFIG,
    ITEMS,
    NAMES,
    RECIPE,
    TOKENIZER,
    TRAINED_ON,
    USERS,
    WEIGHTS,
    check_format,
    check_like,
    checked,
    count_numbers,
    read_hashes,
    read_json,
    read_tensors,
)

if TYPE_CHECKING:
    from fastrec.nn.user_model import UserModel


def check_model_folder(path: Path) -> None:
    """Raise FileNotFoundError for a folder that holds no model."""
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            inside = ", but its folder model does" if (path / "model" / name).is_file() else ""
            if (path / ADAPTER).is_file():
                inside = ", but an adapter: --pretrained is its model, --adapter this folder"
            raise FileNotFoundError(
                f"{path / name} is missing: {path} holds no fastrec model{inside}"
            )


def read_model(kind: "type[UserModel]", path: Path, encoder: Any = None) -> "UserModel":
    """`UserModel.from_pretrained`, of the class `kind`."""
    check_model_folder(path)
    for name in NAMES:
        checked(path, name)
    model = _described(kind, path, encoder)
    file = path / WEIGHTS
    state = read_tensors(file)
    floats = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(floats) == 1:
        model = model.to(floats.pop())
    check_like(file, state, model.state_dict())
    model.load_state_dict(state)
    model.trained_on = _told(path / TRAINED_ON) or {}
    model.recipe = _told(path / RECIPE)
    model.known_items, model.seen_users = read_hashes(path / ITEMS), read_hashes(path / USERS)
    if model.texts is not None:
        if not (path / TOKENIZER).is_file():
            raise FileNotFoundError(f"{path / TOKENIZER} is missing")
        model.tokenizer = (path / TOKENIZER).read_text(encoding="utf-8")
    try:
        model.item_input.check_tables()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return model


def check_built(model: "UserModel") -> None:
    """Raise ValueError for a model that is not what its settings make: written, it could not be
    read. Classes and encoders of somebody else may need values where they are made, and are not
    looked at."""
    own = type(model).__module__.startswith("fastrec.")
    if not own or not isinstance(model.config.encoder, Encoders):
        return
    sizes = model.item_input.classes | model.item_input.sizes
    with torch.device("meta"):
        features = unknown_features(model.config.items, model.num_items, sizes)
        built = type(model)(model.num_items, model.config, model.num_users, features)
    has, makes = ({n: [*t.shape] for n, t in m.state_dict().items()} for m in (model, built))
    for name in [*has, *makes]:
        if has.get(name) != makes.get(name):
            raise ValueError(
                "the model is not what its config makes, and could not be read again:"
                f" {name} is {has.get(name, 'missing')}, expected"
                f" {makes.get(name, 'no such tensor')}; merge or remove what wraps its parts"
            )


def _described(kind: "type[UserModel]", path: Path, encoder: Any) -> "UserModel":
    """The model that config.json describes, untrained, if that has as many numbers as the file."""
    values, file = read_json(path / CONFIG), path / WEIGHTS
    try:
        check_format(path, values.pop("format", None))
        num_items = values.pop("num_items", None)
        if type(num_items) is not int or num_items < 1:
            raise ValueError(f"num_items must be a whole number above 0, got {num_items!r}")
        num_users, classes = values.pop("num_users", None), values.pop("item_classes", {})
        vectors, texts = values.pop("item_vectors", {}), values.pop("texts", None)
        config = config_of(values, encoder)
        if config.user_width and (type(num_users) is not int or num_users < 1):
            raise ValueError(f"num_users must be a whole number above 0, got {num_users!r}")
        if not config.user_width and num_users is not None:
            raise ValueError(f"num_users is {num_users!r}, and users have no vectors")
        num_users = num_users or 0
        check_sizes(config, classes, vectors)
        numbers = num_parameters(num_items, config, num_users, classes | vectors)
        if numbers is not None and numbers != count_numbers(file):
            raise ValueError(
                f"it describes a model of {numbers} numbers, {WEIGHTS} holds {count_numbers(file)}"
            )
        features = unknown_features(config.items, num_items, classes | vectors)
        model = kind(num_items, config, num_users, features)
        model.texts = None if texts is None else from_values(Texts, texts, "texts")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / CONFIG}: {error}") from error
    return model


def _told(file: Path) -> dict | None:
    return read_json(file) if file.is_file() else None
