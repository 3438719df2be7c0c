# SPDX-License-Identifier: Apache-2.0
"""Where the kernels of an op are: behind the dispatcher, or in its Triton module."""

import functools
import importlib

import torch


def register_cuda(op: str, *passes: str) -> None:
    """The CUDA kernel of fastrec::{op}_{pass} is that function of `fastrec.kernels.{op}`, imported
    when it is first called: importing fastrec does not need triton."""
    for name in passes:
        launch = functools.partial(_launch, op, f"{op}_{name}")
        torch.library.impl(f"fastrec::{op}_{name}", "CUDA", launch)


def _launch(op: str, name: str, *args):
    return getattr(importlib.import_module(f"fastrec.kernels.{op}"), name)(*args)


def kernels_of(op: str, backend: str, device: torch.device):
    """What has the functions {op}_fwd, {op}_bwd, ... of `backend`, "cpp" or "triton"."""
    if backend == "triton" and device.type != "cuda":  # the interpreter, see backend.interpreting
        return importlib.import_module(f"fastrec.kernels.{op}")
    return torch.ops.fastrec
