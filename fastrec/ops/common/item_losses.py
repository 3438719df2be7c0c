"""What the losses of rows over a table of items share: the checks of their arguments, the reduction
and the gradient of selected rows.

Legend: N scored rows, V items, D width, T rows of `input` before selection.
"""

import torch
from torch import Tensor

from fastrec.ops.common.arguments import check_table, ordered_sum


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


def check_arguments(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    reduction,
    label_smoothing,
    rows,
    sharded=False,
):
    """What the losses ask of their common arguments; ranges are `check_range`'s."""
    check_table(input, linear_weight, linear_bias, sharded)
    items = linear_weight.shape[0]
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 item ids, got {target.dtype}")
    if weight is not None and weight.shape != (items,):
        raise ValueError(f"weight must be [{items}], got {list(weight.shape)}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if rows is not None and rows.dtype not in (torch.int64, torch.bool):
        raise TypeError(f"rows must be int64 positions or a bool mask, got {rows.dtype}")
    scored = input.shape[0] if rows is None or rows.dtype == torch.bool else rows.shape[0]
    if target.shape != (scored,):
        raise ValueError(f"target must be [{scored}], one per scored row, got {list(target.shape)}")
    if rows is not None and rows.dtype == torch.bool and rows.shape != (scored,):
        raise ValueError(f"rows as a mask must be [{scored}], got {list(rows.shape)}")
