# SPDX-License-Identifier: Apache-2.0
"""The softmax over all items without a gradient of the table: backward keeps what it is made of,
and the sweep that would compute it updates the rows instead.

Legend: N scored rows, V items, D width, U rows with more gradient.

A row-wise optimizer needs a row of the gradient once, when it is whole. `pending_loss` keeps the
vectors [N] and the rows [N, D] that the gradient is made of, and `update_rows_` adds to it what
other uses of the table have (the embedding of the inputs: sparse, U rows) and moves each row. What
is read and written is the table and the state of its optimizer, once each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import check_range, check_tensor
from fastrec.ops.common.item_losses import check_arguments, reduce_loss
from fastrec.ops.common.linear_cross_entropy_autograd import OP, LinearCrossEntropy
from fastrec.ops.common.move_rows import RowState, move_rows_
from fastrec.ops.common.native import kernels_of

torch.library.define(
    f"fastrec::{OP}_update_",
    "(Tensor(a!) linear_weight, Tensor(b!)? linear_bias, Tensor input, Tensor target, Tensor lse,"
    " Tensor grad_lse, Tensor grad_target_logit, Tensor rows, Tensor grad_rows,"
    " Tensor(c!)? weight_square, Tensor(d!)? weight_mean, Tensor(e!)? bias_square,"
    " Tensor(f!)? bias_mean, float rate, float bias_rate, float eps, float first, float second)"
    " -> ()",
)


@torch.library.register_fake(f"fastrec::{OP}_update_")
def _(*args):
    return None


class Pending(NamedTuple):
    """What the gradient of a table is made of: input [N, D], target int64 [N], lse [2, N],
    grad_lse [N] and grad_target_logit [N], as in `linear_cross_entropy_bwd`."""

    input: Tensor
    target: Tensor
    lse: Tensor
    grad_lse: Tensor
    grad_target_logit: Tensor


def pending_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    pending: list[Pending],
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """`linear_cross_entropy` with its mean, of a table and biases that get no gradient: backward
    appends to `pending` what `update_rows_` needs. Until then they must not change.

    Args: see `linear_cross_entropy`; input [N, D] in the dtype of the table, float32 or float64.

    Raises ValueError, TypeError, IndexError as there.
    """
    check_arguments(input, linear_weight, linear_bias, None, "mean", 0.0, False)
    backend = resolve(backend, OP, input.device)
    if backend == "reference":
        raise RuntimeError("rows of a loss over all items are updated by the kernels alone")
    wide = input.dtype in (torch.float32, torch.float64)
    if not wide or torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"rows are updated in float32 or float64, got an input of {input.dtype}")
    check_range("target", target, linear_weight.shape[0], ignore_index)
    kept = target != ignore_index
    bias = None if linear_bias is None else linear_bias.detach()
    _, nll, _ = LinearCrossEntropy.apply(
        input if input.requires_grad else input.detach().requires_grad_(),  # backward must come by
        linear_weight.detach(),
        bias,
        torch.where(kept, target, -1),
        None,
        backend,
        pending,
    )
    row_weight = kept.to(nll.dtype)
    return reduce_loss(row_weight * nll, row_weight, "mean")


def update_rows_(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    pending: list[Pending],
    rows: Tensor,
    grad_rows: Tensor,
    weight_state: RowState,
    bias_state: RowState,
    *,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    backend: str | None = None,
) -> None:
    """Move every row of the table of `pending_loss`, and its biases, by their whole gradient. On
    cpp in the sweep that computes it; elsewhere the gradient of the table is stored.

    Args:
        linear_weight, linear_bias: [V, D] and [V], contiguous, as they were in the loss.
        pending: what the losses left, at least one; cleared by the caller.
        rows: int64 [U], ascending and distinct; grad_rows: [U, D], more gradient of these rows.
        weight_state, bias_state: a rate of 0 for biases that stay.
        eps, betas: of Adagrad and Adam; in Adam the rate is that of its step, bias correction
            included.
    """
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None:
            check_tensor(name, tensor, None, (linear_weight.dtype,), linear_weight.device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous: its rows are updated in place")
    width = linear_weight.shape[1]
    check_tensor("grad_rows", grad_rows, (len(rows), width), (linear_weight.dtype,))
    check_range("rows", rows, linear_weight.shape[0])
    # The rows of several losses, one after the other; lse is [2, N].
    x, target, lse, *grads = zip(*pending, strict=True)
    parts = torch.cat(x), torch.cat(target), torch.cat(lse, 1), *map(torch.cat, grads)
    backend = resolve(backend, OP, linear_weight.device)
    if backend == "cpp":
        torch.ops.fastrec.linear_cross_entropy_update_(
            linear_weight, linear_bias, *parts, rows, grad_rows, weight_state.square,
            weight_state.mean, bias_state.square, bias_state.mean, weight_state.rate,
            bias_state.rate, eps, *betas,
        )  # fmt: skip
        return
    # On a GPU the gradient is stored: the kernel of the table there sums each row in pieces.
    bwd = kernels_of(OP, backend, linear_weight.device).linear_cross_entropy_bwd
    grad, grad_bias = bwd(parts[0], linear_weight, linear_bias, *parts[1:])
    grad.index_add_(0, rows, grad_rows)
    every = torch.arange(len(linear_weight), device=linear_weight.device)
    move_rows_(linear_weight, every, grad, weight_state, eps, betas)
    if linear_bias is not None:
        move_rows_(linear_bias, every, grad_bias, bias_state, eps, betas)
