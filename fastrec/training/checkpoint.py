# SPDX-License-Identifier: Apache-2.0
"""A run folder, so that none is taken for another, and a run that ends anywhere goes on.

    recipe.json, stage.json   what the run was started with, for people and `--config`
    transfer.json             which tensors it took from the model that it started from
    metrics/, validation/, tensorboard/    logs
    model/                    the best model so far, first the one that the run started from
    last.ckpt                 what to resume from, and what it was started with
    last.shards-*/            the tables of a run that spreads them over processes
    summary.json              the run has ended

Each appears complete and is replaced in one step. With last.ckpt a run is resumed; without it and
summary.json it is started again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastrec.data.dataset_files import COLD_ITEMS_FILE, digest, features_file
from fastrec.data.output import new_file, remove_folder, tidy, write_json
from fastrec.nn.model_config import ModelConfig, described
from fastrec.nn.model_files import DIGESTS, WEIGHTS
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe
from fastrec.training.model_folder import read_trained_on
from fastrec.training.stage import Stage

# Of the stage: neither the data nor the weights of the steps done so far depend on these, nor on
# the number of steps where the learning rate does not.
MAY_CHANGE = ("patience", "checkpoint_every", "devices", "num_nodes", "backend", "cuda_graph")
# Of the recipe: the other stages may change.
COMPARED = ("model", "texts", "attributes", "evaluation", "users", "seed")
# What a run leaves that ends before its first checkpoint, beside the model it started from.
UNSTARTED = {
    "recipe.json", "stage.json", "transfer.json", "metrics", "validation", "tensorboard"
}  # fmt: skip
SHARDS = "last.shards-"  # folders beside last.ckpt, see `training.shards`
MODEL, LAST, SUMMARY, TRANSFER = "model", "last.ckpt", "summary.json", "transfer.json"
_DIGEST = 64  # characters of SHA-256


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


def _described(dataset, recipe: Recipe, stage: str) -> dict[str, dict]:
    """recipe.json and stage.json as they are read back."""
    data = {"stage": stage, "items": dataset.items_hash, "events": dataset.events_hash}
    current, items = recipe.stage(stage), recipe.model.items
    read = current.event_columns(recipe.model.event_columns)
    data |= {name: dataset.column_hash(name) for name in read}
    digests = dataset.schema.get("digests", {})
    files = {features_file(name) for name in items.features} | current.side_files
    if items.attributes or recipe.texts is not None:
        files.add("items.parquet")
    data |= {file: digests.get(file, "")[:16] for file in sorted(files)}
    data |= _named(recipe, current)
    if current.judge == "cold_start":
        data |= {"rows": digests.get(COLD_ITEMS_FILE), "cold_items": plain(recipe.cold_items)}
    values = {"recipe": plain(recipe), "stage": {**data, **plain(current)}}
    return json.loads(json.dumps(values))


def _named(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Digests of what settings name by a path, to which something else may come. Those of its files
    stand for a model."""
    similar = None if stage.similar is None else stage.similar.model
    models = {"filler": stage.filler, "similar": similar}
    named = {
        f"{name} model": Path(folder) / file
        for name, folder in models.items()
        if folder is not None
        for file in (WEIGHTS, DIGESTS)  # without the second: of an earlier fastrec
        if (Path(folder) / file).is_file()
    }
    if recipe.evaluation.negatives_file is not None:
        named["negatives"] = Path(recipe.evaluation.negatives_file)
    return {name: digest(file)[:16] for name, file in named.items() if file.is_file()}


def identity(dataset, recipe: Recipe, stage: str) -> dict[str, dict]:
    """What must be the same where a run is resumed."""
    made = _described(dataset, recipe, stage)
    constant = recipe.stage(stage).schedule == "constant"
    free = {*MAY_CHANGE, "steps"} if constant else MAY_CHANGE
    return {
        "recipe": {key: made["recipe"][key] for key in COMPARED},
        "stage": {key: value for key, value in made["stage"].items() if key not in free},
    }


def short(run: dict) -> str:
    """Stands for what `identity` gives."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


def check_free(folder: Path, dataset, recipe: Recipe, stage: str) -> None:
    """Raise FileExistsError if `folder` holds more than a run that never reached a checkpoint. Its
    model is the one that it started from, or this run makes it again."""
    if not folder.is_dir():
        if folder.exists():
            raise FileExistsError(f"{folder} is a file")
        return
    found = {path.name for path in folder.iterdir() if not path.name.startswith(SHARDS)}
    if MODEL in found and found <= {MODEL, *UNSTARTED}:
        made = read_trained_on(folder / MODEL)
        if made.get("steps") == 0 or made.get("run") == short(identity(dataset, recipe, stage)):
            found.remove(MODEL)
    if not found <= UNSTARTED:
        raise FileExistsError(f"{folder} is not empty; choose another folder or resume the run")


def tidy_run(folder: Path) -> None:
    """Take away what a killed process left half written in a run folder."""
    for name in (MODEL, LAST, SUMMARY, TRANSFER, "recipe.json", "stage.json", "tables"):
        tidy(folder / name)


def start_run(folder: Path, dataset, recipe: Recipe, stage: str, resume: bool) -> None:
    """Write recipe.json, which `--config` reads, and stage.json. A run that is resumed has not
    ended; of one that is started again, nothing is kept."""
    (folder / SUMMARY).unlink(missing_ok=True)
    if not resume:
        (folder / TRANSFER).unlink(missing_ok=True)
    if not resume and (folder / MODEL).exists():
        remove_folder(folder / MODEL)
    tidy_shards(folder / LAST)
    for name, values in _described(dataset, recipe, stage).items():
        write_json(folder / f"{name}.json", values)


def tidy_shards(path: Path) -> None:
    """Take away the shards beside a checkpoint that it does not name."""
    kept = None
    if path.is_file():
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("shards")
    for folder in path.parent.glob(f"{SHARDS}*"):
        if folder.name != kept:
            remove_folder(folder)


def write_checkpoint(state: dict, path: Path) -> None:
    """`torch.save`, complete and on disk or not at all. The comment of the file, which is a zip
    archive, is the digest of all before it."""
    with new_file(path) as work, work.open("w+b") as file:
        torch.save(state, file)  # into a file of Python's, which says why it cannot be written
        file.seek(-2, os.SEEK_END)
        file.write(_DIGEST.to_bytes(2, "little"))  # the length of the comment
        file.flush()
        file.write(_digest(work, file.tell()).encode())


def read_checkpoint(path: Path) -> dict:
    """Raises ValueError that names the file for one that is not as it was written."""
    with path.open("rb") as file:
        size = max(0, path.stat().st_size - _DIGEST)
        file.seek(size)
        said = file.read()
    if said != _digest(path, size).encode():
        raise ValueError(f"{path} cannot be read: it is damaged, or of another or earlier program")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key, kind in (("global_step", int), ("run", dict), ("kept", bool)):
            if type(state[key]) is not kind:
                raise TypeError(f"{key} is {state[key]!r}")
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return state


def _digest(path: Path, size: int) -> str:
    """SHA-256 of the first bytes of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size:
            part = file.read(min(size, 1 << 22))
            found.update(part)
            size -= len(part)
    return found.hexdigest()


def started_from(initial: UserModel | None) -> str | None:
    """Stands for the weights of the model that a run starts from; None: random ones."""
    if initial is None:
        return None
    found = hashlib.sha256()
    for name, tensor in sorted(initial.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def check_resumed(
    folder: Path, run: dict, steps: int, encoder, given: str | None = None
) -> str | None:
    """What the run in `folder` started from, see `started_from`. A resumed run need not say it.

    Raises FileNotFoundError or ValueError if it cannot go on as `run` to so many steps: no
    checkpoint, a damaged one, other settings, another model than `given`, more steps, or no best
    model."""
    path = folder / LAST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume in {folder}")
    state = read_checkpoint(path)
    pairs = [(state["run"].get(part, {}), values) for part, values in run.items()]
    before, now = state["run"].get("stage", {}), run["stage"]
    if any(before.get(key) != now[key] for key in ("items", "events")):
        raise ValueError(f"{path} is of a run on another data set, or another split of it")
    if differences := [text for before, now in pairs for text in _differences(before, now)]:
        raise ValueError(f"{path} is of a run with other settings: {', '.join(differences)}")
    start = state["run"].get("init")
    if given not in (None, start):
        what = "random weights" if start is None else "another model"
        raise ValueError(f"{path} is of a run that started from {what}, not the one given")
    if state["global_step"] > steps:
        raise ValueError(f"{path} holds {state['global_step']} steps, the run is to have {steps}")
    if state["kept"]:
        UserModel.from_pretrained(folder / MODEL, encoder)
        if read_trained_on(folder / MODEL).get("run") != short(run):
            raise ValueError(f"{folder / MODEL} is of another run than {path}")
    return start


def _differences(before, now, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in now
            for text in _differences(before.get(key), now[key], f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {before!r}, not {now!r}"]
