# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how many there are, which one this is, who starts them, and what of the
caller's a run leaves alone.

Lightning starts those of one machine itself. On several machines, or under a launcher such as
torchrun, each process is started from outside and learns its number from the environment.
"""

import atexit
import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# What launchers say of how many processes there are, and of the number of this one: torchrun and
# Lightning, Slurm (of a step), Open MPI, and the process manager of MPICH and Intel MPI.
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"
)  # fmt: skip


class Processes(NamedTuple):
    """Where a run is: the device of a process, how many are on each of how many machines."""

    device: torch.device
    each: int
    nodes: int = 1

    @property
    def total(self) -> int:
        return self.each * self.nodes


def first_process() -> bool:
    """Whether this is the process, of all machines, that writes and prints: Lightning starts the
    others later, and they run the command again."""
    return not any(int(os.environ.get(name) or 0) for name in _RANKS)


def started_outside() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ)


def processes_of(device: torch.device, devices: int | str, nodes: int) -> Processes:
    """With "auto", one for each GPU, or one on the CPU or a device that is named by its number.

    Raises ValueError where the processes that were started are others: each would train a model of
    its own, and all write it into one folder.
    """
    if device.index is not None and devices not in ("auto", 1):
        raise ValueError(f"devices is {devices}, and device names one, {device}")
    if devices != "auto":
        each = int(devices)
    else:
        each = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    found = Processes(device, each, nodes)
    for name in _SIZES:
        if (said := int(os.environ.get(name) or found.total)) != found.total:
            raise ValueError(
                f"the launcher started {said} processes ({name}), and devices x num_nodes is"
                f" {each} x {nodes}: set devices to the processes of a machine and num_nodes to the"
                " number of machines"
            )
    if (node := int(os.environ.get("NODE_RANK") or 0)) >= nodes:
        raise ValueError(f"NODE_RANK is {node}, and num_nodes is {nodes}")
    if nodes > 1 and "MASTER_ADDR" not in os.environ and "SLURM_PROCID" not in os.environ:
        raise ValueError(
            f"num_nodes is {nodes}: start the command on each machine by torchrun, or with"
            " MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment"
        )
    return found


def let_go() -> None:
    """Behind the last collective of a process: a thread of gloo drops its tensors after those who
    waited for it went on, and takes the lock of Python for that. Where Python has ended by then,
    the process aborts (PyTorch 2.13, pytorch/pytorch#190489)."""
    time.sleep(0.1)  # without the lock


def let_go_at_exit() -> None:
    atexit.unregister(let_go)
    atexit.register(let_go)


@contextlib.contextmanager
def group_of_launcher(device: torch.device) -> Iterator[Any]:
    """The process group of what torchrun has started, None of one process. All but the first print
    nothing; a GPU is that of the process."""
    if not started_outside() or os.environ["WORLD_SIZE"] == "1":
        yield None
        return
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")  # of what the host knows
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if not first_process():
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield dist.group.WORLD
    finally:
        let_go()
        dist.destroy_process_group()


def check_one_gpu(where: Processes, devices: int | str) -> None:
    """Raise ValueError where a CUDA graph cannot be."""
    if where.device.type != "cuda" or where.total != 1:
        gpus = torch.cuda.device_count() if where.device.type == "cuda" else 0
        raise ValueError(
            f"cuda_graph needs one process on one GPU: devices is {devices}, {gpus} GPUs are here"
        )


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Numbers of the stage, whatever the caller is inside of; and the caller draws on as before."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with contextlib.ExitStack() as inside:
        inside.enter_context(warnings.catch_warnings())
        # A GPU that nothing has used yet is not begun for its random state.
        used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        inside.enter_context(torch.random.fork_rng(used))
        inside.enter_context(torch.inference_mode(False))
        for kind in kinds:
            inside.enter_context(torch.autocast(kind, enabled=False))
        yield
