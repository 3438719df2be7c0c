# SPDX-License-Identifier: Apache-2.0
"""Processes with a gloo group, for the tests of ops that take a `group`."""

import datetime
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from backends import interpreted, needs
from op_db.case import Op, Sample, excess

from fastrec.backend import interpreting, unavailable_reason

# Imported once, by the server that the ranks are forks of: each would take 5 s of a core for it.
IMPORTED = ["torch._dynamo", "torch.distributed.tensor", "fastrec"]


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    while (task := pipe.recv()) is not None:
        work, arguments = task
        torch.manual_seed(0)
        try:
            torch.save(work(dist.group.WORLD, *arguments), Path(folder) / f"{rank}.pt")
            pipe.send("")
        except BaseException:
            pipe.send(f"rank {rank} of {world}:\n{traceback.format_exc()}")
            raise
    dist.destroy_process_group()


class Ranks:
    """`world` processes with one group, which serve many calls: their start takes seconds."""

    def __init__(self, world: int):
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, self.folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is seen
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable, *arguments) -> list:
        """What `work(group, *arguments)` returns on each rank."""
        for pipe in self.pipes:
            pipe.send((work, arguments))
        waiting = list(self.pipes)
        while waiting:
            for pipe in wait(waiting):
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "a rank ended without an answer"
                if error:  # the others wait for this rank
                    for process in self.processes:
                        process.kill()
                        process.join()
                    raise RuntimeError(error)
                waiting.remove(pipe)
        return [
            torch.load(Path(self.folder.name) / f"{rank}.pt", weights_only=False)
            for rank in range(len(self.pipes))
        ]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(timeout=30)
        self.folder.cleanup()


def launched(rank: int, world: int, per_node: int = 1) -> dict[str, str]:
    """The environment of a process that torchrun has started, the nodes being `per_node` wide."""
    return {
        "TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(rank // per_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip


def trained(group, data: Path, output: Path, chosen, options: dict | None = None, nodes: int = 1):
    """Train as processes that torchrun has started; the weights of the model, on each rank."""
    from builders import run

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    with patch.dict(os.environ, launched(rank, world, world // nodes)):
        return run(data, output, chosen, **(options or {})).state_dict()


def message_of(call: Callable) -> str:
    """The error that `call` raises, as text."""
    try:
        call()
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    return "no error"


def backends_here(op: str) -> list[str]:
    """In the interpreter triton alone: the others run without it."""
    names = ("triton",) if interpreting() else ("reference", "cpp")
    return [b for b in names if unavailable_reason(b, op, torch.device("cpu")) is None]


def cases_here(op: str, names_of: Callable) -> list:
    """pytest parameters (backend, sample name). Of triton, where it is not, one that is skipped."""
    found = [
        pytest.param(backend, name, marks=interpreted(backend))
        for backend in backends_here(op)
        for name in names_of(backend)
    ]
    if not interpreting():
        marks = [needs("triton", op), *interpreted("triton")]
        found.append(pytest.param("triton", None, id="triton", marks=marks))
    return found


def worlds_and_types(worlds, types) -> list:
    """pytest parameters: float32 in every world, bfloat16 in the smallest; the rest is of
    `make test-all`."""
    found = []
    for world, each in itertools.product(worlds, types):
        plain = each.name == "float32" or (each.name == "bfloat16" and world == min(worlds))
        marks = [] if plain else [pytest.mark.exhaustive]
        found.append(pytest.param((world, each), id=f"{world}-{each}", marks=marks))
    return found


def within_budget(
    op: Op, backend: str, sample: Sample, expected: tuple[dict, dict], whole: dict, cut: str
) -> None:
    """`whole`: results put together from those of the ranks. `expected`: in float64 and in the
    tested type, of one process."""
    exact, low = expected
    for key, value in whole.items():
        assert value.dtype == low[key].dtype
        floor = sample.floor.get(key, 0.0)
        error, budget = excess(value, low[key], exact[key], floor)
        if (band := op.rounding_band(backend, sample)) and value.numel():
            budget += band * max(exact[key].abs().max().item(), floor)
        assert error <= budget, f"{cut} {key}: error {error:.3g}, budget {budget:.3g}"
