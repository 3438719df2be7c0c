# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tables that are spread over processes, by `torch.distributed.checkpoint`.

    last.ckpt             all but the tables and their averages, written by the first process
    last.shards-STEP-..   these, written by every process, read by as many as there are then

The folder is complete before last.ckpt names it, and earlier ones go after that: a run that is
killed anywhere resumes from a pair that belongs together.
"""

import secrets
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastrec.nn.sharded import Part, sharded_parameters
from fastrec.training.checkpoint import SHARDS

TABLES = ("item_input.ids.weight", "item_head.table.weight", "item_head.bias")


def save_shards(checkpoint: dict[str, Any], module, folder: Path) -> None:
    """Move the tables of `module` out of a checkpoint of Lightning's into a new folder of `folder`
    that it names. Every process must call it."""
    (states,) = checkpoint["optimizer_states"]
    states["state"] = {number: dict(state) for number, state in states["state"].items()}  # its own
    places = _places(checkpoint, module)
    found = {key: holder.pop(name) for key, _, holder, name in places}
    names = {key: parameter for key, parameter, _, _ in places}
    name = [f"{SHARDS}{module.trainer.global_step}-{secrets.token_hex(4)}"]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    dcp.save(_as_dtensors(found, names, module), checkpoint_id=folder / name[0])
    checkpoint["shards"] = name[0]
    checkpoint["sharded"] = {key: [names[key], *part.shape[1:]] for key, part in found.items()}


def load_shards(checkpoint: dict[str, Any], module, folder: Path) -> None:
    """The opposite, for as many processes as there are now. Raises ValueError that names the
    folder where it cannot be read."""
    path, blocks = folder / checkpoint["shards"], _blocks(module)
    names = {key: name for key, (name, *_) in checkpoint["sharded"].items()}
    found = {
        key: blocks[name].parameter.new_empty(blocks[name].rows, *shape)
        for key, (name, *shape) in checkpoint["sharded"].items()
    }
    try:
        dcp.load(_as_dtensors(found, names, module), checkpoint_id=path)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}") from error
    for key, padded in found.items():
        tensor = padded[: len(blocks[names[key]].parameter)]
        place, _, kind = key.partition("/")
        if kind:
            checkpoint["optimizer_states"][0]["state"][int(place)][kind] = tensor
        else:
            checkpoint["state_dict"][place] = tensor


class _Block(NamedTuple):
    """A parameter with a row for each item, as it is stored: with as many rows as the table that
    it belongs to, so that both are cut at the same items. part: None of one process."""

    parameter: Tensor
    total: int
    part: Part | None

    @property
    def rows(self) -> int:
        """Of this process."""
        return self.total if self.part is None else self.part.last - self.part.first


def _blocks(module) -> dict[str, _Block]:
    model = module.model
    scoring = model.item_head.table or model.item_input.ids
    found, sharded = {}, sharded_parameters(model)
    for name in TABLES:
        parameter = dict(model.named_parameters()).get(name)
        if parameter is None:
            continue
        part = sharded[name][1] if sharded else None
        total = part.total if part else len(parameter)
        if name == "item_head.bias":
            total = scoring.part.total if sharded else len(scoring.weight)
        part = part and part._replace(total=total)
        found[f"model.{name}"] = _Block(parameter, total, part)
    return found


def _places(checkpoint: dict, module) -> list[tuple[str, str, dict, str]]:
    """(key, parameter, dict that holds it, name there) of each tensor with the rows of a table."""
    (optimizer,), blocks = module.trainer.optimizers, _blocks(module)
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
    found = [(name, name, checkpoint["state_dict"], name) for name in blocks]
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        if names[number] in blocks:
            kinds = [k for k, value in state.items() if isinstance(value, Tensor) and value.dim()]
            found += [(f"{number}/{kind}", names[number], state, kind) for kind in kinds]
    return found


def _as_dtensors(tensors: dict[str, Tensor], names: dict[str, str], module) -> dict[str, Tensor]:
    """Rows of this process as parts of whole tensors; themselves where there is one process."""
    blocks, mesh, found = _blocks(module), None, {}
    for key, tensor in tensors.items():
        block = blocks[names[key]]
        if (missing := block.rows - len(tensor)) > 0:
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        if block.part is None:
            found[key] = tensor
            continue
        world = dist.get_world_size(block.part.group)
        mesh = mesh or init_device_mesh(tensor.device.type, (world,))
        shape = torch.Size([block.total, *tensor.shape[1:]])
        stride = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
        found[key] = DTensor.from_local(
            tensor, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
    return found
