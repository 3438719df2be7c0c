"""Processes with a gloo group, for the tests of ops that take a `group`."""

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, folder: str, world: int, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    torch.save(work(dist.group.WORLD, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder: Path, world: int, work: Callable, *arguments) -> list:
    """What `work(group, *arguments)` returns on each of `world` ranks."""
    folder.mkdir()
    mp.spawn(_enter, (str(folder), world, work, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def message_of(call: Callable) -> str:
    """The error that `call` raises, as text."""
    try:
        call()
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    return "no error"
