# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of a linear layer, without the N x V logits: public function and reference.

Legend: N scored rows, V items, D width, T rows of `input` before selection.

What the kernels compute is in `linear_cross_entropy_autograd`: the log-sum-exp and the target logit
of every row. Class weights, smoothing, z-loss and reductions are arithmetic on these [N] vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    autocast_input,
    check_number,
    check_range,
    ordered_sum,
    without_autocast,
)
from fastrec.ops.common.item_losses import check_arguments, reduce_loss, scored_rows, select_rows
from fastrec.ops.common.linear_cross_entropy_autograd import (
    OP,
    STORED_ITEMS,
    LinearCrossEntropy,
    PlainLoss,
    zero_unscored,
)


def linear_cross_entropy_ref(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    rows=None,
    z_loss=0.0,
):
    """The oracle: plain PyTorch, any dtype, materialises the logits."""
    if rows is not None and rows.dtype == torch.bool:
        target = torch.where(rows, target, ignore_index)
    elif rows is not None:
        input = input[rows]
    bias = None if linear_bias is None else linear_bias.to(input.dtype)
    kept = target != ignore_index
    input = zero_unscored(input, torch.where(kept, target, -1))
    logits = F.linear(input, linear_weight.to(input.dtype), bias)
    logits = logits.to(accumulate_dtype(input))
    y = torch.where(kept, target, 0)
    class_weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    lse = torch.logsumexp(logits, dim=1)
    log_p = torch.log_softmax(logits, dim=1)
    row_weight = class_weight[y] * kept
    loss = -(1 - label_smoothing) * row_weight * log_p.gather(1, y[:, None]).squeeze(1)
    if label_smoothing:
        loss = loss - kept * (log_p @ class_weight) * (label_smoothing / logits.shape[1])
    loss = loss + z_loss * row_weight * lse.square()
    loss = torch.where(kept, loss, 0)
    return reduce_loss(loss, row_weight, reduction)


def _stored(x, linear_weight, linear_bias, target, weight, ignore_index, reduction) -> Tensor:
    """The sum or mean of the losses of rows x [N, D], by the kernel for few items, which stores the
    logits."""
    class_weight = None if weight is None else weight.detach().to(x.dtype).contiguous()
    mean = reduction == "mean"
    try:
        return PlainLoss.apply(
            x, linear_weight, linear_bias, target, class_weight, ignore_index, mean
        )
    except RuntimeError:
        # Names the row that is wrong.
        check_range("target", target, linear_weight.shape[0], ignore_index)
        raise


def _row_losses(
    input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, rows, z_loss,
    group, backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss_i, a_i) of the scored rows, [N] each; with a `group` of the whole table."""
    kept = target != ignore_index
    y = torch.where(kept, target, -1)
    items, accumulate = linear_weight.shape[0], accumulate_dtype(input)
    class_weight = None if weight is None else weight.detach().to(accumulate)
    smoothed = None
    if label_smoothing:
        smoothed = class_weight
        if smoothed is None:
            smoothed = input.new_ones(items, dtype=accumulate)
    if group is not None:
        from fastrec.ops.common.linear_cross_entropy_group import sharded_rows

        lse, nll, smoothing, row_weight = sharded_rows(
            input, linear_weight, linear_bias, y, rows, class_weight, smoothed, backend, group
        )
    else:
        lse, nll, class_sum = LinearCrossEntropy.apply(
            select_rows(input, rows), linear_weight, linear_bias, y, smoothed, backend, None
        )
        row_weight = kept.to(accumulate)
        if class_weight is not None:
            row_weight = row_weight * class_weight[y.clamp_min(0)]
        if smoothed is not None:
            smoothing = (ordered_sum(smoothed) * lse - class_sum) / items
    losses = (1 - label_smoothing) * row_weight * nll
    if label_smoothing:
        losses = losses + label_smoothing * (kept * smoothing)
    if z_loss:
        losses = losses + z_loss * row_weight * lse.square()
    return losses, row_weight


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
    z_loss: float = 0.0,
    group=None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of `input[rows] @ linear_weight.T + linear_bias`, logits never stored.

    Arguments and semantics are those of `torch.nn.functional.linear_cross_entropy`, plus `rows`,
    `z_loss` and `group`. With a_i = weight[target_i] (1 without `weight`), and 0 for ignored rows:

        loss_i = (1 - label_smoothing) a_i (lse_i - s_i,y) + z_loss a_i lse_i^2
                 + label_smoothing / V * sum_j weight_j (lse_i - s_ij)

    This is the softmax of masked item prediction (UPRec, eq. 6-7) with the item table as W.

    Args:
        input: [T, D], float64, float32, bfloat16 or float16; [..., D] counts as its rows.
        linear_weight: item table [V, D], same dtype, or float32 beside a low-precision input.
        target: item ids in [0, V), one per scored row: [N] for index `rows`, else [T], or [...]
            like the input. Ids and `rows` are int64, or int32, which is converted.
        linear_bias: [V]. -inf takes an item out of the softmax.
        weight: class weights [V], not differentiated.
        reduction: "mean" (divided by sum of a_i, by 1 when that is 0), "sum" or "none".
        ignore_index: target value of rows that are not scored: loss 0, no gradient. None is -100,
            as in torch.
        label_smoothing: in [0, 1].
        rows: positions in the T rows to score: [N] (repeats allowed), or a bool mask [T] or [...].
        z_loss: weight of the squared log-partition term.
        group: a torch.distributed process group (or one-dimensional DeviceMesh) whose ranks hold
            consecutive slices of the items: `linear_weight`, `linear_bias` and `weight` are those
            of this rank, of any length, also 0. `target` counts in all items. A `linear_weight`
            that is a DTensor, Shard(0) over one mesh dimension, brings its group. Everything else
            must be the same on all ranks, the upstream gradient of the loss included.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        float32 (float64 for float64 input): a scalar, or like `target` for "none" (0 where a mask
        is False). Gradients have the dtype of their tensor; products accumulate in
        float32. On a GPU float32 is multiplied as sums of two bfloat16, exact to 2^-15; by FMA if
        `torch.backends.cuda.matmul.fp32_precision` is "ieee", and on Blackwell before Triton 3.9.
        Not twice differentiable with `group`.

        With `group` the loss is that of the whole table and the same on all ranks. It is counted
        once: every rank gets the whole gradient of `input` (summed over the ranks in backward) and
        that of its own items, neither scaled by the number of ranks. Two collectives forward, a
        few integers and at most five numbers a row; one backward, [N, D], if `input` needs a
        gradient.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong, or sizes, targets or options
            differ between the ranks (a device assertion on a GPU).
        IndexError: a target or a row is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    check_number("ignore_index", ignore_index, whole=True)
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss, finite=True)
    sharded = group is not None or hasattr(linear_weight, "device_mesh")
    if sharded:
        from fastrec.ops.common.linear_cross_entropy_group import local_tensors

        # Before the other checks: it says what may be a DTensor.
        linear_weight, group, linear_bias, weight = local_tensors(
            input, linear_weight, group, linear_bias, weight
        )
    input, target, rows, shape = scored_rows(input, target, rows)
    input = autocast_input(input)
    check_arguments(input, linear_weight, linear_bias, weight, reduction, label_smoothing, sharded)
    if rows is not None and rows.dtype == torch.bool:
        target, rows = torch.where(rows, target, ignore_index), None
    backend = resolve(backend, OP, input.device)
    plain = reduction != "none" and not label_smoothing and not z_loss and not sharded
    full = input.dtype in (torch.float32, torch.float64)
    # Under no_grad a Function is still told that its inputs need gradients.
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)
    )
    items = linear_weight.shape[0]
    stored = backend == "cpp" and plain and full and learns and items <= STORED_ITEMS
    # That kernel checks the targets itself: 80 us less of 730 where a small call finds cold caches.
    if not sharded and (not stored or torch.compiler.is_compiling()):
        check_range("target", target, items, ignore_index)
    if rows is not None:
        check_range("rows", rows, input.shape[0])
    if backend == "reference" and not sharded:
        with without_autocast(input.device):  # its sums over the items overflow float16
            loss = linear_cross_entropy_ref(
                input,
                linear_weight,
                target,
                linear_bias=linear_bias,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                rows=rows,
                z_loss=z_loss,
            )
        return loss.view(shape) if reduction == "none" else loss
    if stored:
        x = select_rows(input, rows)
        return _stored(x, linear_weight, linear_bias, target, weight, ignore_index, reduction)
    losses, row_weight = _row_losses(
        input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, rows,
        z_loss, group, backend,
    )  # fmt: skip
    loss = reduce_loss(losses, row_weight, reduction)
    return loss.view(shape) if reduction == "none" else loss
