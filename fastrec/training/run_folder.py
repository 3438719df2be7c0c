"""What a run was started with, in its folder, so that it is not resumed as another one."""

import dataclasses
import json
from pathlib import Path

from fastrec.training.config import Recipe, Stage

# Of the stage: neither the data nor the weights of the steps done so far depend on these.
MAY_CHANGE = ("steps", "patience", "checkpoint_every", "devices", "backend", "cuda_graph")
# Of the recipe: the other stages may change.
COMPARED = ("model", "attributes", "social", "evaluation", "users")


def _described(recipe: Recipe, stage: Stage, task: str) -> tuple[dict, dict]:
    """(recipe.json, stage.json) as they are read back."""
    values = dataclasses.asdict(recipe), {"task": task, **dataclasses.asdict(stage)}
    return json.loads(json.dumps(values[0])), json.loads(json.dumps(values[1]))


def describe_run(folder: Path, recipe: Recipe, stage: Stage, task: str) -> None:
    """Write recipe.json, which `--config` reads, and stage.json."""
    for name, values in zip(("recipe", "stage"), _described(recipe, stage, task), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def check_same_run(folder: Path, recipe: Recipe, stage: Stage, task: str) -> None:
    """Raise ValueError that names the settings in which the run in `folder` was another one."""
    whole, own = _described(recipe, stage, task)
    wanted = {"recipe": {key: whole[key] for key in COMPARED}}
    wanted["stage"] = {key: value for key, value in own.items() if key not in MAY_CHANGE}
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
