# SPDX-License-Identifier: Apache-2.0
"""What the losses of rows over a table of items share: the checks of their arguments, the reduction
and the gradient of selected rows.

Legend: N scored rows, V items, D width, T rows of `input` before selection.
"""

import torch
from torch import Tensor

from fastrec.ops.common.arguments import (
    BOOL,
    FLOATS,
    check_index,
    check_reduction,
    check_table,
    check_tensor,
    ordered_sum,
)
from fastrec.tensors import INDEX


def reduce_loss(loss: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return ordered_sum(loss)
    # No scored row, or only rows of weight 0: the mean is 0 with a live graph, not NaN.
    total = ordered_sum(row_weight)
    return ordered_sum(loss) / torch.where(total == 0, 1, total)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, rows):
        ctx.save_for_backward(rows)
        ctx.shape = input.shape
        return input.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return spread_rows(grad, rows, ctx.shape), None


def select_rows(input: Tensor, rows: Tensor | None) -> Tensor:
    """input[rows], all for None, with a gradient that is added up in a fixed order."""
    return input if rows is None else _SelectRows.apply(input, rows)


def spread_rows(grad: Tensor, rows: Tensor | None, shape) -> Tensor:
    """The gradient of input[rows] as the gradient of the input, in a fixed order of additions."""
    if rows is None:
        return grad
    if grad.is_cpu:
        return grad.new_zeros(shape).index_add(0, rows, grad)
    # Sorts; index_add there is atomic.
    return grad.new_zeros(shape).index_put((rows,), grad, accumulate=True)


def scored_rows(
    input: Tensor, target: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size]:
    """(input [T, D], target int64 [N], rows int64 [N] or bool [T], shape of the losses) of an input
    [..., D]; ranges are `check_range`'s."""
    check_tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must be [..., D], got []")
    device, shape = input.device, input.shape[:-1]
    if rows is not None:
        check_tensor("rows", rows, None, INDEX + BOOL, device)
        if rows.dtype == torch.bool:
            check_tensor("rows, a mask,", rows, shape, BOOL)
            rows = rows.reshape(-1)
        else:
            rows = check_index("rows", rows, ("N",), device)
            shape = rows.shape
    target = check_index("target", target, shape, device)
    if input.dim() != 2:
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    return input, target, rows, shape


def check_arguments(
    input, linear_weight, linear_bias, weight, reduction, label_smoothing, sharded=False
):
    """What the losses ask of their other common arguments."""
    check_table(input, linear_weight, linear_bias, sharded)
    if weight is not None:
        check_tensor("weight", weight, linear_weight.shape[:1], FLOATS, input.device)
    check_reduction(reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
