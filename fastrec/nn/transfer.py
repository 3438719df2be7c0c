# SPDX-License-Identifier: Apache-2.0
"""What a stage takes from the model that it starts from, and what it then leaves alone; a model of
one catalogue for another."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrec.data.batch import SPECIAL_TOKENS
from fastrec.data.item_categories import Categories
from fastrec.nn.encoders.sublayers import Patch
from fastrec.nn.items import unknown_features
from fastrec.nn.user_model import UserModel

# What the names of the tensors of a part begin with. The last three are inside of `items` and
# `head`, and belong to no list of items.
PARTS = {
    "items": ("item_input.",),
    "encoder": ("encoder.",),
    "head": ("item_head.",),
    "input": ("item_input.levels.", "item_input.join.", "item_input.features."),
    "transform": ("item_head.dense.", "item_head.norm."),
    "users": ("item_head.users.",),
}
WHOLE = {"items", "encoder", "head"}
_IDS, _SPECIAL = "item_input.ids.weight", len(SPECIAL_TOKENS)


def take(
    model: UserModel, initial: UserModel, parts: list[str], same_users: bool = True
) -> list[str]:
    """Copy `parts`, see `PARTS`, of `initial` into `model`; returns the names of the tensors that
    were copied. Patches that `initial` has not are left as they are, and so are the user vectors of
    the head where the users are not the same. "input" has the vectors of special tokens, the last
    rows of the table of ids, whatever the items are.

    Raises ValueError that names the first tensor that does not fit, or a part that has none.
    """
    own, theirs = model.state_dict(), initial.state_dict()
    copied: list[str] = []
    for part in (part for part in PARTS if part in parts):
        names = [name for name in own if name.startswith(PARTS[part])]
        if not names and part != "input":
            raise ValueError(f"init.take names {part!r}, and the model has nothing of the kind")
        for name in (name for name in names if name not in copied):
            if part == "input" and name.endswith(".table"):
                continue  # of the items
            if name not in theirs and ".patches." in name:
                continue
            if name.startswith("item_head.users.") and not same_users:
                continue
            if name not in theirs or own[name].shape != theirs[name].shape:
                given = list(theirs[name].shape) if name in theirs else "nothing"
                raise ValueError(
                    f"{part} cannot be taken over: {name} is {list(own[name].shape)}, the model to"
                    f" start from has {given}; leave {part} out of init.take"
                )
            copied.append(name)
    with torch.no_grad():
        for name in copied:
            own[name].copy_(theirs[name])
        if "input" in parts and _IDS not in copied:
            own[_IDS][-_SPECIAL:].copy_(theirs[_IDS][-_SPECIAL:])
            copied.append(f"{_IDS}: special tokens")
    return copied


def with_items(
    model: UserModel,
    rows: Tensor,
    vectors: Mapping[str, Tensor] | None = None,
    like: Categories | None = None,
) -> UserModel:
    """The model for another list of items: item i of it is item `rows[i]` of `model`, or new where
    that is -1. A new item begins with the mean of all vectors, and of all biases, and its
    attributes are unknown; it learns with the others in training.

    rows: int64 [V_new].
    vectors: [V_new, F] of features by name, what new items have; 0 for others.
    like: categories of the V_new items: a new item begins with the mean over its categories of the
        mean of the known items in them, where there are any.
    """
    rows = rows.to(model.device)
    new, config = (rows < 0).nonzero().squeeze(1), model.config
    sizes = model.item_input.classes | model.item_input.sizes
    features = unknown_features(config.items, len(rows), sizes)
    features |= {name: part for name, part in (vectors or {}).items() if name in sizes}
    made = UserModel(len(rows), config, model.num_users, features)
    made = made.to(rows.device, model.item_embedding.weight.dtype)
    made.recipe, made.seen_users = model.recipe, model.seen_users
    made.trained_on = {name: said for name, said in model.trained_on.items() if name != "items"}
    nearest = None if like is None else _shares(like, rows)
    before, state = model.state_dict(), made.state_dict()
    for name, tensor in state.items():
        kept = before[name]
        if name.startswith("item_input.features.") and name.endswith(".table"):
            tensor[rows >= 0] = kept[rows[rows >= 0]]
            continue
        if name == _IDS and config.items.ids:  # the special tokens are its last rows
            kept, special = kept[: model.num_items], kept[model.num_items :]
            tensor[len(rows) :] = special
            tensor = tensor[: len(rows)]
        elif name == _IDS or not (
            name in ("item_head.bias", "item_head.table.weight")
            or (name.startswith("item_input.attributes.") and name.endswith(".table"))
        ):
            tensor.copy_(kept)
            continue
        start = kept.mean(0) if kept.is_floating_point() else -torch.ones_like(kept[0])
        tensor.copy_(kept[rows.clamp_min(0)])
        tensor[new] = start.expand(len(new), *start.shape)
        if nearest is not None and kept.is_floating_point():
            items, theirs, mine = nearest
            means = torch.sparse.mm(
                mine, torch.sparse.mm(theirs, tensor.view(len(tensor), -1).to(mine.dtype))
            )
            tensor[items] = means.view(len(items), *start.shape).to(tensor.dtype)
    return made


def _shares(like: Categories, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(new items with a category that a known item has, int64 [N]; the part of each item in the
    mean of a category, sparse [C, V_new]; the part of each category in the mean of a new item,
    sparse [N, C])."""
    table = like.table.to(rows.device).long()
    item, place = (table >= 0).nonzero().unbind(1)
    category, known = table[item, place], rows[item] >= 0
    size = torch.bincount(category[known], minlength=like.classes)
    asks = ~known & (size[category] > 0)
    items, number, count = item[asks].unique(return_inverse=True, return_counts=True)
    theirs, mine = (
        torch.sparse_coo_tensor(
            torch.stack(pairs), 1 / parts.float(), shape, device=rows.device, check_invariants=True
        )
        for pairs, parts, shape in (
            ((category[known], item[known]), size[category[known]], (like.classes, len(rows))),
            ((number, category[asks]), count[number], (len(items), like.classes)),
        )
    )
    return items, theirs, mine


def freeze(model: UserModel, parts: Iterable[str], second_norm: bool = False) -> None:
    """Train everything but `parts`, see `PARTS`; model patches inside of them are trained, and with
    `second_norm` the second LayerNorm of each block of the encoder (PeterRec, Yuan et al., 2020,
    section 3.3). The vectors of special tokens are rows of the table of ids: they are frozen with
    "items", and with "input" where items have no ids.

    Raises ValueError for an encoder whose blocks have none.
    """
    for part in parts:
        alone = part == "input" and not model.config.items.ids
        for name, parameter in model.named_parameters():
            if name.startswith(PARTS[part]) or (alone and name == _IDS):
                parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Patch):
            module.requires_grad_(True)
    norms = [m.second_norm for m in model.encoder.modules() if hasattr(m, "second_norm")]
    if second_norm and not norms:
        raise ValueError(f"init.second_norm: {type(model.encoder).__name__} has no such LayerNorm")
    for norm in norms if second_norm else ():
        norm.requires_grad_(True)


def report(taken: Iterable[str], *modules: nn.Module) -> dict[str, Any]:
    """What a stage starts with, as JSON has it: the tensors of modules that were "taken" and the
    "new" ones, shapes by name, and the names of those that are "trained".

    taken: what `take` returned.
    """
    tensors = [pair for module in modules for pair in module.state_dict().items()]
    parameters = [pair for module in modules for pair in module.named_parameters()]
    known = set(taken)
    special = [name for name in known if name.startswith(f"{_IDS}:")]  # some rows of a tensor
    shapes = {name: [_SPECIAL, tensors[0][1].shape[1]] for name in special}
    return {
        "taken": {name: list(tensor.shape) for name, tensor in tensors if name in known} | shapes,
        "new": {name: list(tensor.shape) for name, tensor in tensors if name not in known},
        "trained": [name for name, parameter in parameters if parameter.requires_grad],
    }


def trained_share(*modules: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of the parameters of modules."""
    sizes = [(p.numel() * p.requires_grad, p.numel()) for m in modules for p in m.parameters()]
    trained, whole = zip(*sizes, strict=True)
    return sum(trained), sum(whole)
