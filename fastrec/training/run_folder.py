"""What a run and its model were made of, in their folders, so that neither is taken for another."""

import dataclasses
import json
import os
from pathlib import Path

from fastrec.data.dataset import SequenceDataset
from fastrec.training.config import Recipe, Stage, Users

# Of the stage: neither the data nor the weights of the steps done so far depend on these, nor on
# the number of steps where the learning rate does not.
MAY_CHANGE = ("patience", "checkpoint_every", "devices", "backend", "cuda_graph")
# Of the recipe: the other stages may change.
COMPARED = ("model", "attributes", "social", "evaluation", "users")
# What a run leaves that ends before its first checkpoint.
UNSTARTED = {"recipe.json", "stage.json", "metrics", "tensorboard"}
MODEL = "trained_on.json"


def _described(dataset, recipe: Recipe, stage: Stage, task: str) -> tuple[dict, dict]:
    """(recipe.json, stage.json) as they are read back."""
    data = {"task": task, "items": dataset.items_hash, "events": dataset.num_events}
    values = dataclasses.asdict(recipe), {**data, **dataclasses.asdict(stage)}
    return json.loads(json.dumps(values))


def first_process() -> bool:
    """Whether this is the process that writes and prints: DDP starts the others later, and they run
    the command again."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def check_free(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds more than a run that never reached a checkpoint."""
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= UNSTARTED:
        raise FileExistsError(f"{folder} is not empty; choose another folder or resume the run")


def describe_run(folder: Path, dataset, recipe: Recipe, stage: Stage, task: str) -> None:
    """Write recipe.json, which `--config` reads, and stage.json."""
    described = _described(dataset, recipe, stage, task)
    for name, values in zip(("recipe", "stage"), described, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def check_same_run(folder: Path, dataset, recipe: Recipe, stage: Stage, task: str) -> None:
    """Raise ValueError that names the settings in which the run in `folder` was another one."""
    whole, own = _described(dataset, recipe, stage, task)
    free = {*MAY_CHANGE, "steps"} if stage.schedule == "constant" else MAY_CHANGE
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


def describe_model(
    folder: Path, dataset, recipe: Recipe, stage: Stage, initial: Path | None = None
) -> None:
    """Write beside a model which items its table means, which users it has seen (here, and before
    if it started from the model in `initial`), and which vector its attribute head reads. What an
    earlier model in `folder`, of the same run, had seen is kept: a resumed run may not say
    `initial`."""
    seen = [dataclasses.asdict(recipe.users)]
    for earlier in (initial, folder):
        known = [] if earlier is None else trained_on(earlier).get("users", [])
        seen += [users for users in known if users not in seen]
    values = {
        "items": dataset.items_hash,
        "users": seen,
        "attribute_pool": stage.objectives.attribute_pool,
    }
    (folder / MODEL).write_text(json.dumps(values, indent=2) + "\n")


def trained_on(folder: Path) -> dict:
    """What `describe_model` wrote; empty for a model that was saved otherwise."""
    file = folder / MODEL
    return json.loads(file.read_text()) if file.is_file() else {}


def check_model(folder: Path, dataset: SequenceDataset, held_out: Users | None = None) -> None:
    """Raise ValueError if the model in `folder` was trained on other items than those of `dataset`,
    or has seen users that `held_out` leaves out."""
    made = trained_on(folder)
    if "items" in made and made["items"] != dataset.items_hash:
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
