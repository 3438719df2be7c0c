# SPDX-License-Identifier: Apache-2.0
"""The files of a model folder, and whether they belong together.

config.json         settings of the model
model.safetensors   its weights
tokenizer.json      of one that reads the texts of items
trained_on.json, recipe.json, items.npy, users.npy   of one that `fit` trained: hashes of the ids of
                    its items, and of the users that it has seen
heads.safetensors   parameters of its objectives, in the folder that `fit` writes
digests.json        a digest of each, written last

Those of an adapter, which has no weights of its own, are in `training.adapters`.
"""

import json
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from torch import Tensor

from fastrec.data.dataset_files import digest
from fastrec.data.output import new_file, write_json, write_text

FORMAT = 3
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEADS, TRAINED_ON, USERS = "heads.safetensors", "trained_on.json", "users.npy"
ITEMS, RECIPE = "items.npy", "recipe.json"
TOKENIZER = "tokenizer.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
NAMES = (CONFIG, WEIGHTS, HEADS, TRAINED_ON, ITEMS, USERS, RECIPE, TOKENIZER)
DIGESTS = "digests.json"


def write_model(
    folder: Path,
    config: dict,
    weights: Mapping[str, Tensor],
    told: Mapping[str, dict | str | np.ndarray | None],
) -> None:
    """Write a model into `folder`. What belongs to an earlier one there goes. told: JSON objects,
    texts and hashes by the name of their file; None: it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES[2:]:
        (folder / name).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, {"format": FORMAT, **config})
    for name, what in told.items():
        if isinstance(what, np.ndarray):
            write_hashes(folder / name, what)
        elif isinstance(what, str):
            write_text(folder / name, what)
        elif what is not None:
            write_json(folder / name, what)
    write_digests(folder)


def write_hashes(file: Path, hashes: np.ndarray) -> None:
    with new_file(file) as work:
        np.save(work, hashes)


def read_hashes(file: Path) -> np.ndarray | None:
    """uint64 [N] in a file of a model that is `checked`; None where it is not there. Raises
    ValueError that names the file."""
    if not file.is_file():
        return None
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no list of hashes: {error}") from error
    if found.dtype != np.dtype("<u8") or found.ndim != 1:
        raise ValueError(f"{file} is no list of hashes: {found.dtype} {list(found.shape)}")
    return found


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata=None) -> None:
    from safetensors.torch import save_file

    with new_file(file) as work:
        work.touch()
        mode = work.stat().st_mode  # by the umask; safetensors makes a file for its owner alone
        save_file({name: part.contiguous() for name, part in tensors.items()}, work, metadata)
        work.chmod(mode)


def write_digests(folder: Path) -> None:
    names = [*NAMES, ADAPTER, ADAPTER_WEIGHTS]
    digests = {name: digest(folder / name) for name in names if (folder / name).is_file()}
    write_json(folder / DIGESTS, digests)


def checked(folder: Path, name: str) -> Path:
    """The file of a model, as it was written, or not there and not written either.

    Raises FileNotFoundError or ValueError that names the file. A folder without digests.json, of an
    earlier fastrec, passes: `UserModel.from_pretrained` says so.
    """
    file, digests = folder / name, _digests(folder)
    if digests is None:
        return file
    if name in digests and not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if file.exists() and digest(file) != digests.get(name):
        raise ValueError(
            f"{file} is not the file that was written with {DIGESTS}: damaged, or of another model"
        )
    return file


def check_format(folder: Path, version) -> None:
    """Raise ValueError for a version that is not read, or a model that was saved in part."""
    if version == 2 and not (folder / DIGESTS).exists():
        warnings.warn(
            f"{folder} was saved by an earlier fastrec: without {DIGESTS}, damage may stay unseen",
            stacklevel=6,  # who calls load_model
        )
    elif version != FORMAT:
        raise ValueError(f"unknown format version {version!r}, expected {FORMAT}")
    elif not (folder / DIGESTS).exists():
        raise ValueError(f"{folder / DIGESTS} is missing: the model was saved in part")


def _digests(folder: Path) -> dict | None:
    file = folder / DIGESTS
    return read_json(file) if file.exists() else None


def read_json(file: Path) -> dict:
    """Raises ValueError that names the file: no JSON, or no object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object, but {type(values).__name__}")
    return values


def count_numbers(file: Path) -> int:
    """How many numbers a safetensors file says to hold; nothing is read but its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return sum(prod(opened.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError that names the file: damaged, or numbers that are not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{file}: {name} is not finite: the training had diverged")
    return state


def check_like(file: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the first tensor of a file that is not as `own` has it."""
    for name in [*own, *(name for name in state if name not in own)]:
        expected, given = (
            f"{str(side[name].dtype).removeprefix('torch.')} {list(side[name].shape)}"
            if name in side
            else "nothing"
            for side in (own, state)
        )
        if expected != given:
            raise ValueError(f"{file}: {name} must be {expected}, the file has {given}")
