# SPDX-License-Identifier: Apache-2.0
"""Submodules whose parameters a fused op may read, and what happens to the others.

LoRA wrappers, pruning, quantisation and hooks replace a submodule, or act when it is called: a
fused op that read its weight would pass them by. What is not just the module that was built is
called as a module.
"""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastrec.ops.common.distinct_rows import sparse_rows
from fastrec.ops.linear import linear

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether `module` is of class `kind` itself, and nothing hooks on its calls."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by the fused op for a plain nn.Linear."""
    if is_plain(module, nn.Linear):
        return linear(x, module.weight, module.bias)
    return module(x)


class _FirstRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, rows):
        ctx.shape = table.shape
        return table[:rows]

    @staticmethod
    def backward(ctx, grad):
        grad = grad.coalesce()
        return sparse_rows(grad.indices()[0], grad.values(), ctx.shape), None


def first_rows(table: Tensor, rows: int, sparse: bool) -> Tensor:
    """The first rows of a table [V, D]; torch's own slice takes no sparse gradient."""
    if len(table) == rows:
        return table
    return _FirstRows.apply(table, rows) if sparse else table[:rows]


def embedding_table(module: nn.Module, rows: int) -> Tensor:
    """The vectors of the indices 0 .. rows - 1 of an embedding: its weight if it is plain."""
    if is_plain(module, nn.Embedding):
        return module.weight
    device = next(module.parameters()).device
    return module(torch.arange(rows, device=device))
