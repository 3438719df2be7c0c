# SPDX-License-Identifier: Apache-2.0
"""heads.safetensors: the parameters of the objectives that a model was trained with, and what their
outputs stand for."""

import json
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from fastrec.nn.model_files import HEADS, check_like, checked, read_tensors, write_tensors
from fastrec.nn.pool import Interests, Pool
from fastrec.objectives.joint import JointObjective


def save_heads(objective: JointObjective, folder: Path) -> None:
    """Write the parameters of the objectives into `folder`; nothing without parameters. What the
    outputs of an objective stand for, its `scales`, is stored with them."""
    if state := objective.parts.state_dict():
        write_tensors(folder / HEADS, state, {"scales": json.dumps(_scales(objective))})


def load_heads(objective: JointObjective, folder: Path, only: list[str] | None = None) -> list[str]:
    """Read what `save_heads` wrote; returns the names of the tensors that were set.

    only: take over these objectives, where both sides have them, but for what is counted in the
        data of a stage, their `of_data`; otherwise the file must hold every parameter of
        `objective`, with the same `scales`: the same attributes with the same classes,
        standardisation and pool. What was counted of other data, by `counted` of the scales, stays.

    Raises FileNotFoundError or ValueError that names the file and what is wrong with it.
    """
    file, own = checked(folder, HEADS), objective.parts.state_dict()
    if not file.is_file():
        if only is not None or not own:
            return []
        raise FileNotFoundError(f"{file} is missing: the model was not trained for this task")
    state = read_tensors(file)
    saved, scales = saved_scales(folder), _scales(objective)
    kept = {
        f"{name}.{tensor}"
        for name, part in objective.parts.items()
        for tensor in getattr(part, "of_data", ())
        if only is not None or _counted(saved.get(name)) != _counted(scales.get(name))
    }
    names = [name for name in own if name not in kept]
    if only is not None:
        names = [name for name in names if name.split(".")[0] in only and name in state]
    for name in names:
        if name not in state:
            raise ValueError(f"{file} holds no {name}: the model was not trained for this task")
        if state[name].shape != own[name].shape:
            given = list(state[name].shape)
            raise ValueError(
                f"{file}: {name} must be {list(own[name].shape)}, the file has {given};"
                " is it from another set of attributes or another width?"
            )
    # Other lists may have as many outputs: one of two classes, or two numbers.
    for objective_name in {name.split(".")[0] for name in names} & set(scales):
        pairs = zip_longest(saved.get(objective_name, []), scales[objective_name])
        for trained, here in pairs:
            if _meant(trained) != _meant(here):
                raise ValueError(
                    f"{file}: it was trained to predict {trained}, here that output is {here}"
                )
    objective.parts.load_state_dict({name: state[name] for name in names}, strict=False)
    return names


def _counted(scales: list | None) -> str | None:
    """A digest of the data in which an objective has counted something."""
    return scales[0].get("counted") if scales else None


def _meant(scale: dict | None) -> dict | None:
    """What an output stands for, wherever it was counted."""
    return scale and {name: what for name, what in scale.items() if name != "counted"}


def load_pool(objective: JointObjective, folder: Path, name: str) -> list[str]:
    """Let the pools of `objective` begin with the parameters of that of the objective `name` in
    `folder`; returns the names of the tensors that were set.

    Raises ValueError where that one has none, or none here has the same.
    """
    file, own = checked(folder, HEADS), objective.parts.state_dict()
    prefix = f"{name}.pool."
    state = read_tensors(file) if file.is_file() else {}
    given = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    if not given:
        raise ValueError(f"init.pool: {file} holds no parameters of a pool of {name}")
    taken: dict[str, Tensor] = {}
    for part in objective.parts:
        names = {key: f"{part}.pool.{key}" for key in given}
        if all(n in own and own[n].shape == given[key].shape for key, n in names.items()):
            taken |= {n: given[key] for key, n in names.items()}
    if not taken:
        raise ValueError(f"init.pool has no effect: no objective of this stage pools as {name} did")
    objective.parts.load_state_dict(taken, strict=False)
    return list(taken)


def trained_pool(folder: Path | str, how: str, width: int) -> Pool:
    """The pool "attention" or "interests" as an objective of the model, or adapter, in `folder` has
    trained it. width: of the model.

    Raises ValueError where none has, several have, or it is of another width.
    """
    file = checked(Path(folder), HEADS)
    state = read_tensors(file) if file.is_file() else {}
    end = {"attention": ".pool.query", "interests": ".pool.queries"}[how]
    owners = [name.removesuffix(end) for name in state if name.endswith(end)]
    if len(owners) != 1:
        said = (
            f"several objectives have one, {sorted(owners)}" if owners else "no objective has one"
        )
        raise ValueError(f"pool {how}: {said} in {folder}")
    prefix = f"{owners[0]}.pool."
    own = {n.removeprefix(prefix): part for n, part in state.items() if n.startswith(prefix)}
    number = own[end.removeprefix(".pool.")].numel() // max(width, 1)
    try:
        pool = Pool("attention" if how == "attention" else Interests(number), width)
        check_like(file, own, pool.state_dict())
    except ValueError as error:
        raise ValueError(f"pool {how} of {owners[0]}: {error}") from error
    pool.load_state_dict(own)
    return pool


def saved_scales(folder: Path) -> dict[str, list]:
    """What the outputs of the objectives beside a model stand for."""
    from safetensors import SafetensorError, safe_open

    file = checked(folder, HEADS)
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            scales = json.loads((opened.metadata() or {}).get("scales", "{}"))
        if not all(
            isinstance(part["pool"], (str, dict)) for part in scales.get("user_attributes", [])
        ):
            raise ValueError("the scales of user_attributes have no pool")
        if not all(
            type(part.get("hidden", 0)) is int for part in scales.get("user_attributes", [])
        ):
            raise ValueError("the scales of user_attributes have no width of the hidden layer")
    except (SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from error
    return scales


def _scales(objective: JointObjective) -> dict[str, list]:
    parts = objective.parts.items()
    return {name: list(part.scales) for name, part in parts if hasattr(part, "scales")}  # type: ignore[arg-type]
