"""What a stage takes from the model that it starts from, and what it then leaves alone."""

from collections.abc import Iterable

import torch
from torch import nn

from fastrec.nn.encoders.sublayers import Patch
from fastrec.nn.user_model import UserModel

PARTS = {"items": "item_input", "encoder": "encoder", "head": "item_head"}


def take(
    model: UserModel, initial: UserModel, parts: list[str], same_users: bool = True
) -> list[str]:
    """Copy `parts` ("items", "encoder", "head") of `initial` into `model`; returns the names of the
    tensors that were copied. Patches that `initial` has not are left as they are, and so are the
    user vectors of the head where the users are not the same.

    Raises ValueError that names the first tensor that does not fit.
    """
    own, theirs = model.state_dict(), initial.state_dict()
    copied = []
    for part in (part for part in PARTS if part in parts):
        for name in (name for name in own if name.startswith(PARTS[part] + ".")):
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
    return copied


def freeze(model: UserModel, parts: Iterable[str]) -> None:
    """Train everything but `parts`; model patches inside of them are trained."""
    for part in parts:
        getattr(model, PARTS[part]).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Patch):
            module.requires_grad_(True)


def trained_share(*modules: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of the parameters of modules."""
    sizes = [(p.numel() * p.requires_grad, p.numel()) for m in modules for p in m.parameters()]
    trained, whole = zip(*sizes, strict=True)
    return sum(trained), sum(whole)
