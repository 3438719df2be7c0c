"""The parameters of objectives, kept beside a model in heads.safetensors."""

import json
from itertools import zip_longest
from pathlib import Path

from torch import nn

FILE = "heads.safetensors"


def save_heads(objective: nn.Module, path: Path) -> None:
    """Write the parameters of the objectives into the folder `path`; nothing without parameters.
    What the outputs for user attributes stand for is stored with them."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in objective.state_dict().items()}
    if state:
        save_file(state, path / FILE, metadata={"attributes": json.dumps(_scales(objective))})


def load_heads(objective: nn.Module, path: Path, only: str | None = None) -> list[str]:
    """Read what `save_heads` wrote; returns the names of the tensors that were set.

    only: take the tensors whose names start so, where both sides have them; otherwise the file must
        hold every parameter of `objective`, for the same attributes with the same classes and
        standardisation.

    Raises FileNotFoundError or ValueError that names the file and what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    file = path / FILE
    if not file.is_file():
        if only is not None:
            return []
        raise FileNotFoundError(f"{file} is missing: the model was not trained for this task")
    try:
        state = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error
    own = objective.state_dict()
    names = [name for name in own if only is None or (name.startswith(only) and name in state)]
    for name in names:
        if name not in state or state[name].shape != own[name].shape:
            given = list(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{file}: {name} must be {list(own[name].shape)}, the file has {given};"
                " is it from another set of attributes or another width?"
            )
    if only is None and "attributes" in metadata:
        # Other lists may have as many outputs: one of two classes, or two numbers.
        for trained, here in zip_longest(json.loads(metadata["attributes"]), _scales(objective)):
            if trained != here:
                raise ValueError(
                    f"{file}: it was trained to predict {trained}, here that output is {here}"
                )
    objective.load_state_dict({name: state[name] for name in names}, strict=False)
    return names


def _scales(objective: nn.Module) -> list[dict]:
    head = getattr(objective, "user_attribute", None)
    return [] if head is None else head.scales
