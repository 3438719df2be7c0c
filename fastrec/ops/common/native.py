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


class _Unrecorded:
    """What `forward` of an autograd function receives where nothing is recorded."""

    def save_for_backward(self, *tensors) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def applied(function, *args):
    """function.apply(*args), of a function whose `forward` does not ask which gradients are needed.
    Where none is recorded it is `forward` alone: autograd takes some 15 us a call, a quarter of a
    request for one user."""
    recorded = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    if recorded or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_Unrecorded(), *args)


def kernels_of(op: str, backend: str, device: torch.device):
    """What has the functions {op}_fwd, {op}_bwd, ... of `backend`, "cpp" or "triton"."""
    if backend == "triton" and device.type != "cuda":  # the interpreter, see backend.interpreting
        return importlib.import_module(f"fastrec.kernels.{op}")
    return torch.ops.fastrec
