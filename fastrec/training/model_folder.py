# SPDX-License-Identifier: Apache-2.0
"""What stands beside the weights of a trained model: the parameters of objectives, the items that
its table means, the users that it has seen, and the recipe."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrec.data.dataset import SequenceDataset
from fastrec.data.item_categories import item_categories
from fastrec.data.item_texts import TextData
from fastrec.data.item_vectors import item_vectors
from fastrec.data.output import replaced_folder
from fastrec.nn.model_files import (
    ITEMS,
    TRAINED_ON,
    USERS,
    checked,
    read_hashes,
    read_json,
    write_digests,
)
from fastrec.nn.text_model import TextModel
from fastrec.nn.transfer import with_items
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.training.adapters import with_adapter
from fastrec.training.config import Users
from fastrec.training.heads_file import save_heads
from fastrec.training.stage_data import held_out_users

MOST_CATEGORIES = 16  # of an item that are looked at
KEYS = {
    "items": str, "events": str, "users": str, "stage": str, "run": str, "steps": int,
    "scores_items": bool,
}  # fmt: skip


def save_model(
    folder: Path,
    model: UserModel,
    objective: JointObjective,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with the parameters of its objectives; one that is in `folder` is replaced in
    one step. state: the weights, where the model has them in part."""
    with replaced_folder(folder) as work:
        model.save_pretrained(work, state)
        save_heads(objective, work)
        write_digests(work)


def read_trained_on(folder: Path) -> dict:
    """What `fit` has told of a model, see `KEYS`; empty for one that it has not trained."""
    file = checked(folder, TRAINED_ON)
    values = read_json(file) if file.is_file() else {}
    for key, kind in KEYS.items():
        if key in values and type(values[key]) is not kind:
            raise ValueError(f"{file}: {key} is {values[key]!r}, expected {kind.__name__}")
    return values


def seen_users(dataset, users: Tensor, earlier: list[np.ndarray | None]) -> np.ndarray | None:
    """Whom a model has seen that is trained on `users`, after models that have seen `earlier`:
    uint64, ascending, a hash of each original id, so that a user is the same in every data set.
    None where an earlier model does not say it."""
    known = [part for part in earlier if part is not None]
    if len(known) < len(earlier):
        return None
    return np.unique(np.concatenate([hashes(dataset.user_ids()[users.numpy()]), *known]))


def hashes(ids: np.ndarray) -> np.ndarray:
    """uint64: of the text of each id."""
    made = (hashlib.blake2b(str(each).encode(), digest_size=8).digest() for each in ids.tolist())
    return np.frombuffer(b"".join(made), dtype="<u8")


def read_seen(folder: Path) -> np.ndarray | None:
    """Whom the model in `folder` has seen; None if it does not say it."""
    return read_hashes(checked(folder, USERS))


def for_items_of(
    model: UserModel, folder: Path, dataset: SequenceDataset, new_items_like: str | None = None
) -> UserModel:
    """The model in `folder` for the items of `dataset`: itself where these are its own, in their
    order; otherwise `with_items`, by the original ids, with a warning that counts the new ones.

    new_items_like: column of items.parquet: new items begin as the mean of known ones that share a
        category with them.

    Raises ValueError if it knows none of them, or does not say which items it knows.
    """
    if model.has_items_of(dataset):
        return model
    known, asked = model.known_items, hashes(dataset.item_ids())
    if known is None:
        raise ValueError(
            f"{folder} was trained on other items, or in another order, than {dataset.path} has"
        )
    if len(known) != model.num_items:
        raise ValueError(
            f"{folder / ITEMS} lists {len(known)} items, the model has {model.num_items}"
        )
    order = known.argsort()
    place = order[np.searchsorted(known, asked, sorter=order).clip(max=len(known) - 1)]
    rows = np.where(known[place] == asked, place, -1)
    if np.array_equal(rows, np.arange(model.num_items)):
        raise ValueError(
            f"{folder / TRAINED_ON} and {folder / ITEMS} do not agree: the items are those of"
            f" {dataset.path}"
        )
    like = None
    if new_items_like is not None:
        like = item_categories(dataset, {new_items_like: MOST_CATEGORIES})[new_items_like]
    new = int((rows < 0).sum())
    if new == len(rows):
        raise ValueError(f"{folder} was trained on other items: it knows none of {dataset.path}")
    gone, said = len(known) - (len(rows) - new), []
    if new:
        said.append(
            f"{new:,} of the {len(rows):,} items of {dataset.path} are new to it and begin as the"
            f" mean of {'those' if like is None else f'known ones of the same {new_items_like}'}"
        )
        if like is not None:
            said[-1] += ", of all where there are none"
    if gone:
        said.append(f"{gone:,} of its items are not in {dataset.path}")
    if said:  # otherwise they stand in another order
        warnings.warn(
            f"{folder} was trained on {len(known):,} items: {' and '.join(said)}", stacklevel=2
        )
    sizes = model.item_input.sizes
    there = [name for name in sizes if name in dataset.schema.get("item_features", {})]
    found = item_vectors(dataset, there)
    for name, vectors in found.items():
        if vectors.shape[1] != sizes[name]:
            raise ValueError(
                f"item features {name!r} of {dataset.path} have {vectors.shape[1]} numbers, those"
                f" of {folder} {sizes[name]}"
            )
    if new and (unknown := [name for name in sizes if name not in found]):
        warnings.warn(
            f"{dataset.path} has no item features {unknown[0]!r}: new items have zeros",
            stacklevel=2,
        )
    grown = with_items(model, torch.from_numpy(rows), found, like)
    grown.trained_on["items"], grown.known_items = dataset.items_hash, asked
    return grown


def load_model(
    path: Path | str,
    dataset: SequenceDataset,
    held_out: Users | None = None,
    same_items: bool = True,
    same_users: bool = True,
    new_items_like: str | None = None,
    adapter: Path | str | None = None,
) -> UserModel | TextModel:
    """The model in the folder `path`, for the items of `dataset` unless `same_items` is false (see
    `for_items_of`: known items by their ids, new ones as the mean, of those of the same category
    where `new_items_like` names a column of item attributes). One that reads the texts of items is
    a `TextModel`, for any items. adapter: folder of patches and heads that it gets, see
    `with_adapter`. Raises ValueError where it does not belong to `dataset`, see `check_model`."""
    path = Path(path)
    if isinstance(dataset, str | Path):
        raise TypeError(
            f"expected a SequenceDataset, got {dataset!r}: SequenceDataset.load reads it"
        )
    model = UserModel.from_pretrained(path)
    if adapter is not None:
        model = with_adapter(model, adapter)
        check_model(Path(adapter), dataset, held_out, same_users)
    if model.texts is not None:
        if new_items_like is not None:
            raise ValueError(f"new_items_like has no effect: {path} reads the texts of items")
        check_model(path, dataset, held_out, same_users)
        return TextModel(model, TextData(dataset, model.texts, model.tokenizer))
    if same_items:
        model = for_items_of(model, path, dataset, new_items_like)
    if same_users:
        model.check_users(dataset)
    check_model(path, dataset, held_out, same_users)
    return model


def check_model(
    folder: Path,
    dataset: SequenceDataset,
    held_out: Users | None = None,
    same_users: bool = True,
) -> None:
    """Raise ValueError if the model in `folder` has vectors of other users than those of `dataset`
    (but for `same_users` false), or has seen users of `dataset` that `held_out` leaves out."""
    made = read_trained_on(folder)
    if same_users and "users" in made and made["users"] != dataset.users_hash:
        raise ValueError(
            f"{folder} has vectors of other users, or in another order, than {dataset.path} has"
        )
    if held_out is None or held_out.fraction >= 1:
        return
    seen = read_seen(folder)
    if seen is None:
        warnings.warn(
            f"{folder} does not say which users it has seen: it may be tested on some of them",
            stacklevel=2,
        )
        return
    tested = dataset.user_ids()[held_out_users(dataset, held_out).numpy()]
    known = np.isin(hashes(tested), seen)
    if known.any():
        raise ValueError(
            f"{folder} would be tested on users that it has seen: {known.sum()} of {len(tested)},"
            f" the first is {str(tested[known.argmax()])!r}; it was trained with other"
            " users.fraction or users.seed, or on another data set"
        )
