# SPDX-License-Identifier: Apache-2.0
"""A row-wise optimizer on the rows of a table that a step has touched.

Legend: V rows of a table, D width, U rows that move.

Adam reads and writes a row of the table and of its two averages and reads the gradient: 7 D numbers
a row, at addresses of which none follows another. PyTorch's operations, a gather or a scatter for
each tensor, took half of a training step at 10^6 items
(docs/log/sampled_linear_cross_entropy.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrec.backend import unavailable_reason

torch.library.define(
    "fastrec::move_rows_",
    "(Tensor(a!) table, Tensor rows, Tensor grad, Tensor(b!)? square, Tensor(c!)? mean, float rate,"
    " float eps, float first, float second) -> ()",
)


@torch.library.register_fake("fastrec::move_rows_")
def _(*args):
    return None


class RowState(NamedTuple):
    """The state of a row-wise optimizer for one tensor [V, D] or [V]: none for SGD; `square` [V]
    for Adagrad, the sums of the mean squares of a row; for Adam the averages `square` and `mean`,
    like the tensor. rate: what a step is multiplied with."""

    rate: float
    square: Tensor | None = None
    mean: Tensor | None = None

    def first(self, rows: int) -> "RowState":
        square, mean = (None if part is None else part[:rows] for part in self[1:])
        return RowState(self.rate, square, mean)


def move_rows_(
    table: Tensor,
    rows: Tensor,
    grad: Tensor,
    state: RowState,
    eps: float,
    betas: tuple[float, float],
) -> None:
    """Move rows of a tensor [V, D] or [V] by their gradients [U, D] or [U]. rows: int64 [U],
    ascending and distinct."""
    if _is_native(table, grad, *state[1:]):
        parts = (state.square, state.mean, state.rate, eps, *betas)
        torch.ops.fastrec.move_rows_(table, rows, grad, *parts)
    else:
        move_rows_ref_(table, rows, grad, state, eps, betas)


def _is_native(table: Tensor, grad: Tensor, *state: Tensor | None) -> bool:
    parts = [part for part in (table, *state) if part is not None]
    wide = table.dtype in (torch.float32, torch.float64)
    alike = all(part.dtype == table.dtype for part in (grad, *parts))
    together = all(part.is_contiguous() for part in parts)
    native = unavailable_reason("cpp", "move_rows_", table.device) is None
    return wide and alike and together and native


def move_rows_ref_(table, rows, grad, state, eps, betas) -> None:
    """The oracle: plain PyTorch, any dtype."""
    grad = grad.to(table.dtype)
    if state.square is None:
        table.index_add_(0, rows, grad, alpha=-state.rate)
        return
    if state.mean is None:
        square = grad.square().mean(1) if grad.dim() == 2 else grad.square()
        total = state.square[rows] + square
        state.square[rows] = total
        scale = (state.rate / (total.sqrt() + eps)).view(-1, *[1] * (grad.dim() - 1))
        table.index_add_(0, rows, grad * scale, alpha=-1)
        return
    first, second = betas
    mean = torch.lerp(grad, state.mean[rows], first)
    square = torch.lerp(grad.square(), state.square[rows], second)
    state.mean[rows], state.square[rows] = mean, square
    table.index_add_(0, rows, mean / (square.sqrt() + eps), alpha=-state.rate)
