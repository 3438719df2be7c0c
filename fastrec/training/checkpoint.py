"""What a run and its model leave in their folders, so that neither is taken for another: the
settings of a run, what a model was trained on, the parameters of objectives."""

import dataclasses
import json
import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from fastrec.data.dataset import SequenceDataset
from fastrec.nn.user_model import ModelConfig, described
from fastrec.objectives.joint import JointObjective
from fastrec.training.config import Recipe, Users

# Of the stage: neither the data nor the weights of the steps done so far depend on these, nor on
# the number of steps where the learning rate does not.
MAY_CHANGE = ("patience", "checkpoint_every", "devices", "backend", "cuda_graph")
# Of the recipe: the other stages may change.
COMPARED = ("model", "attributes", "evaluation", "users", "seed")
# What a run leaves that ends before its first checkpoint.
UNSTARTED = {"recipe.json", "stage.json", "metrics", "tensorboard"}
MODEL, HEADS = "trained_on.json", "heads.safetensors"


def plain(value: Any) -> Any:
    """Settings as JSON has them; what is no dataclass of settings by the name of its class."""
    if isinstance(value, ModelConfig):
        return described(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _described(dataset, recipe: Recipe, stage: str) -> tuple[dict, dict]:
    """(recipe.json, stage.json) as they are read back."""
    data = {"stage": stage, "items": dataset.items_hash, "events": dataset.events_hash}
    values = plain(recipe), {**data, **plain(recipe.stage(stage))}
    return json.loads(json.dumps(values))


def first_process() -> bool:
    """Whether this is the process that writes and prints: DDP starts the others later, and they run
    the command again."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def check_free(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds more than a run that never reached a checkpoint."""
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= UNSTARTED:
        raise FileExistsError(f"{folder} is not empty; choose another folder or resume the run")


def describe_run(folder: Path, dataset, recipe: Recipe, stage: str) -> None:
    """Write recipe.json, which `--config` reads, and stage.json."""
    for name, values in zip(("recipe", "stage"), _described(dataset, recipe, stage), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def check_same_run(folder: Path, dataset, recipe: Recipe, stage: str) -> None:
    """Raise ValueError that names the settings in which the run in `folder` was another one."""
    whole, own = _described(dataset, recipe, stage)
    constant = recipe.stage(stage).schedule == "constant"
    free = {*MAY_CHANGE, "steps"} if constant else MAY_CHANGE
    wanted = {"recipe": {key: whole[key] for key in COMPARED}}
    wanted["stage"] = {key: value for key, value in own.items() if key not in free}
    differences = []
    for name, values in wanted.items():
        file = folder / f"{name}.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        differences += _differences({key: before.get(key) for key in values}, values)
    if differences:
        raise ValueError(
            f"the run in {folder} was started with other settings: {', '.join(differences)}"
        )


def _differences(before, now, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in now
            for text in _differences(before.get(key), now[key], f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {before!r}, not {now!r}"]


def check_checkpoint(path: Path, steps: int) -> None:
    """Raise ValueError for a checkpoint that cannot be read, or holds more steps."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read, is it truncated? {error}") from error
    if state["global_step"] > steps:
        raise ValueError(f"{path} holds {state['global_step']} steps, the run is to have {steps}")


def describe_model(
    folder: Path, dataset, recipe: Recipe, stage: str, initial: Path | None = None
) -> None:
    """Write beside a model which items its table means, in which stage it was trained and which
    users it has seen (here, and before if it started from the model in `initial`). What an earlier
    model in `folder`, of the same run, had seen is kept: a resumed run may not say `initial`."""
    seen = [dataclasses.asdict(recipe.users)]
    for earlier in (initial, folder):
        known = [] if earlier is None else trained_on(earlier).get("users", [])
        seen += [users for users in known if users not in seen]
    values = {"items": dataset.items_hash, "users": seen, "stage": stage}
    (folder / MODEL).write_text(json.dumps(values, indent=2) + "\n")


def trained_on(folder: Path) -> dict:
    """What `describe_model` wrote; empty for a model that was saved otherwise."""
    file = folder / MODEL
    return json.loads(file.read_text()) if file.is_file() else {}


def check_model(
    folder: Path,
    dataset: SequenceDataset,
    held_out: Users | None = None,
    same_items: bool = True,
) -> None:
    """Raise ValueError if the model in `folder` was trained on other items than those of `dataset`
    (but for `same_items` false), or has seen users that `held_out` leaves out."""
    made = trained_on(folder)
    if same_items and "items" in made and made["items"] != dataset.items_hash:
        raise ValueError(
            f"{folder} was trained on other items, or in another order, than {dataset.path} has"
        )
    if held_out is None or held_out.fraction >= 1:
        return
    own = dataclasses.asdict(held_out)
    if others := [users for users in made.get("users", []) if users != own]:
        raise ValueError(
            f"{folder} was trained with users {others[0]}, and would be tested on users that it has"
            f" seen: users is {own} here"
        )


def save_heads(objective: JointObjective, folder: Path) -> None:
    """Write the parameters of the objectives into `folder`; nothing without parameters. What the
    outputs of an objective stand for, its `scales`, is stored with them."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in objective.parts.state_dict().items()}
    if state:
        save_file(state, folder / HEADS, metadata={"scales": json.dumps(_scales(objective))})


def load_heads(objective: JointObjective, folder: Path, only: list[str] | None = None) -> list[str]:
    """Read what `save_heads` wrote; returns the names of the tensors that were set.

    only: take over these objectives, where both sides have them; otherwise the file must hold every
        parameter of `objective`, with the same `scales`: the same attributes with the same classes,
        standardisation and pool.

    Raises FileNotFoundError or ValueError that names the file and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / HEADS
    if not file.is_file():
        if only is not None or not objective.parts.state_dict():
            return []
        raise FileNotFoundError(f"{file} is missing: the model was not trained for this task")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error
    own = objective.parts.state_dict()
    names = [n for n in own if only is None or (n.split(".")[0] in only and n in state)]
    for name in names:
        if name not in state or state[name].shape != own[name].shape:
            given = list(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{file}: {name} must be {list(own[name].shape)}, the file has {given};"
                " is it from another set of attributes or another width?"
            )
    # Other lists may have as many outputs: one of two classes, or two numbers.
    saved, scales = saved_scales(folder), _scales(objective)
    for objective_name in {name.split(".")[0] for name in names} & set(scales):
        pairs = zip_longest(saved.get(objective_name, []), scales[objective_name])
        for trained, here in pairs:
            if trained != here:
                raise ValueError(
                    f"{file}: it was trained to predict {trained}, here that output is {here}"
                )
    objective.parts.load_state_dict({name: state[name] for name in names}, strict=False)
    return names


def saved_scales(folder: Path) -> dict[str, list]:
    """What the outputs of the objectives beside a model stand for."""
    from safetensors import safe_open

    if not (folder / HEADS).is_file():
        return {}
    with safe_open(folder / HEADS, framework="pt") as opened:
        return json.loads((opened.metadata() or {}).get("scales", "{}"))


def _scales(objective: JointObjective) -> dict[str, list]:
    parts = objective.parts.items()
    return {name: list(part.scales) for name, part in parts if hasattr(part, "scales")}  # type: ignore[arg-type]
