# SPDX-License-Identifier: Apache-2.0
"""Binary cross-entropy of a linear layer against many labels a row, without the N x A logits and
without the N x A labels.

Legend: N rows, A labels, D width, L lists of labels, E listed labels.

With s_na = x_n . W_a + b_a, turned around where a is a label of row n (z = -s there, else s), both
parts of the loss are one function, exact at either end:

    loss_n = sum_a softplus(z_na),   d loss_n / d s_na = sigmoid(z_na), negative where a is a label

Forward computes the loss and its gradient of x in one sweep, backward the scores again for W and b.
On a CPU the gradients of a sum or mean come out of one sweep: what the sum is multiplied by later
multiplies them all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    autocast_input,
    check_index,
    check_lists,
    check_offsets,
    check_range,
    check_reduction,
    check_table,
    ordered_sum,
    without_autocast,
)
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable
from fastrec.tensors import has_values

OP = "multilabel_bce"
NOT_SCORED = -100
MOST_SUMMED = 2**21  # numbers of a table whose gradient forward adds up, in some parts at a time
_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor label_values,"
    " Tensor label_offsets, Tensor label_rows"
)

# label_rows [N] int64, -1 = row not scored: its outputs are 0. loss [N] and d loss_n / dx_n [N, D]
# ([0, D] if not asked for) have the accumulating dtype.
torch.library.define(
    f"fastrec::{OP}_fwd", f"({_INPUTS}, bool with_input) -> (Tensor loss, Tensor grad_input)"
)
# On cpp alone: the same, and the gradients of the sum of the losses by the table [A, D] and by its
# bias [A] ([0] if None), in the accumulating dtype.
torch.library.define(
    f"fastrec::{OP}_sum",
    f"({_INPUTS}, bool with_input)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)
# grad_weight [A, D] and grad_bias [A] ([0] if None) have the dtypes of the table and its bias.
torch.library.define(
    f"fastrec::{OP}_bwd", f"({_INPUTS}, Tensor grad_loss) -> (Tensor grad_weight, Tensor grad_bias)"
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, label_values, label_offsets, label_rows, with_input):
    rows, width = input.shape
    loss = input.new_empty(rows, dtype=accumulate_dtype(input))
    return loss, loss.new_empty(rows if with_input else 0, width)


@torch.library.register_fake(f"fastrec::{OP}_sum")
def _(input, linear_weight, linear_bias, label_values, label_offsets, label_rows, with_input):
    rows, width = input.shape
    loss = input.new_empty(rows, dtype=accumulate_dtype(input))
    bias = loss.new_empty(0 if linear_bias is None else linear_bias.shape[0])
    grad_input = loss.new_empty(rows if with_input else 0, width)
    return loss, grad_input, loss.new_empty(linear_weight.shape), bias


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(input, linear_weight, linear_bias, label_values, label_offsets, label_rows, grad_loss):
    # Contiguous, whatever the strides of the inputs are.
    bias = (
        grad_loss.new_empty(0) if linear_bias is None else linear_bias.new_empty(linear_bias.shape)
    )
    return linear_weight.new_empty(linear_weight.shape), bias


register_cuda(OP, "fwd", "bwd")


def _losses_ref(input, linear_weight, linear_bias, label_values, label_offsets, label_rows):
    """[N], 0 where not scored: stores the logits, and the labels of every list."""
    dtype = accumulate_dtype(input)
    bias = None if linear_bias is None else linear_bias.to(input.dtype)
    logits = F.linear(input, linear_weight.to(input.dtype), bias).to(dtype)
    owner = torch.repeat_interleave(label_offsets.diff(), output_size=len(label_values))
    # One list more, of rows that are not scored, for an index where there are no lists.
    hot = logits.new_zeros(len(label_offsets), logits.shape[1], dtype=torch.bool)
    hot = hot.index_put((owner, label_values), hot.new_ones(()))[label_rows]
    # binary_cross_entropy_with_logits, whose small losses are differences of large numbers.
    losses = -F.logsigmoid(torch.where(hot, logits, -logits)).sum(1)
    return losses.masked_fill(label_rows < 0, 0)


def _recompute(ctx, *saved):
    input, linear_weight, linear_bias, *lists = saved[:6]
    inputs = input, linear_weight, linear_bias
    losses = _losses_ref(*inputs, *lists)
    return inputs, (ordered_sum(losses) if ctx.summed else losses,)


class _MultilabelBce(torch.autograd.Function):
    """loss [N] of the rows, their sum if `summed`; `learns`: whether gradients may be asked for."""

    @staticmethod
    def forward(
        ctx, x, linear_weight, linear_bias, label_values, label_offsets, label_rows,
        summed, learns, backend,
    ):  # fmt: skip
        kernels = kernels_of(OP, backend, x.device)
        inputs = x, linear_weight, linear_bias, label_values, label_offsets, label_rows
        needs_input, *needs_table = ctx.needs_input_grad[:3]
        small = linear_weight.numel() <= MOST_SUMMED and backend == "cpp"
        ctx.swept = summed and learns and any(needs_table) and small
        run = kernels.multilabel_bce_sum if ctx.swept else kernels.multilabel_bce_fwd
        loss, *grads = run(*inputs, learns and needs_input)
        ctx.save_for_backward(*inputs, *grads)
        ctx.summed, ctx.backend = summed, backend
        return ordered_sum(loss) if summed else loss

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_loss):
        saved = ctx.saved_tensors
        inputs, per_row, of_table = saved[:6], saved[6], saved[7:]
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            upstream = grad_loss if ctx.summed else grad_loss[:, None]
            grad_input = (per_row * upstream).to(inputs[0].dtype)
        if ctx.swept:
            grad_weight, grad_bias = (grad * grad_loss for grad in of_table)
            grad_weight = grad_weight.to(inputs[1].dtype)
            grad_bias = grad_bias if inputs[2] is None else grad_bias.to(inputs[2].dtype)
        elif needs_weight or needs_bias:
            bwd = kernels_of(OP, ctx.backend, per_row.device).multilabel_bce_bwd
            grad_weight, grad_bias = bwd(*inputs, grad_loss.expand(len(inputs[0])).contiguous())
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *[None] * 6,
        )


def multilabel_bce_ref(
    input,
    linear_weight,
    label_values,
    label_offsets,
    *,
    linear_bias=None,
    label_rows=None,
    reduction="mean",
):
    """The oracle: plain PyTorch, any dtype, materialises logits and labels."""
    if label_rows is None:
        label_rows = torch.arange(len(input), device=input.device)
    kept = label_rows != NOT_SCORED
    losses = _losses_ref(
        input, linear_weight, linear_bias, label_values, label_offsets,
        torch.where(kept, label_rows, -1),
    )  # fmt: skip
    loss = losses if reduction == "none" else ordered_sum(losses)
    return _divided(loss, kept, linear_weight.shape[0], reduction)


def _divided(loss: Tensor, kept: Tensor, labels: int, reduction: str) -> Tensor:
    return loss / kept.sum().clamp_min(1) / labels if reduction == "mean" else loss


def _check_lists(values: Tensor, offsets: Tensor, labels: int) -> None:
    check_range("label_values", values, labels)
    rule = "must rise within each list, each label once"
    check_lists("label_values", values, "label_offsets", offsets, rule, distinct=True)


def multilabel_bce(
    input: Tensor,
    linear_weight: Tensor,
    label_values: Tensor,
    label_offsets: Tensor,
    *,
    linear_bias: Tensor | None = None,
    label_rows: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """`binary_cross_entropy_with_logits` of `input @ linear_weight.T + linear_bias` against labels
    in lists; neither the N x A logits nor the N x A labels are stored.

        s = input @ linear_weight.T + linear_bias
        loss_n = sum_a softplus(s_na) - sum over the labels a of row n of s_na

    The masked and associated attribute prediction of S3-Rec (Zhou et al., 2020, eq. 5 and 7) is
    this loss of the states at items against the attributes of the items.

    Args:
        input: [N, D], float64, float32, bfloat16 or float16.
        linear_weight: [A, D], A > 0, same dtype, or float32 beside a low-precision input.
        label_values: [E], the labels in [0, A) of all lists, end to end: those of a list rise, and
            a label that stands in it twice is an error. Ids, offsets and rows are int64, or int32,
            which is converted.
        label_offsets: [L + 1]: list l is label_values[label_offsets[l]:label_offsets[l + 1]]; it
            may be empty.
        linear_bias: [A]. -inf takes a label out.
        label_rows: [N], the list of each row, -100 where a row is not scored (loss 0, no gradient).
            Rows may share lists: those of items, read by the item of each row. None: row n has list
            n, and L = N.
        reduction: "mean" over the scored rows and the A labels, as in torch (0 where no row is
            scored), "sum", or "none": the N sums over the labels.
        backend: None (native to the device), "reference", "cpp" or "triton", whose kernels take
            widths up to 256.

    Returns:
        float32 (float64 for float64 input): a scalar, or [N] for "none". Gradients have the dtype
        of their tensor; products accumulate in float32.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong, or a list does not rise.
        IndexError: a label or a row of `label_rows` is out of range. Of values a device assertion
            on a GPU.
        RuntimeError: `backend` cannot run.
    """
    check_table(input, linear_weight, linear_bias)
    check_reduction(reduction)
    device, rows, labels = input.device, input.shape[0], linear_weight.shape[0]
    label_values = check_index("label_values", label_values, ("E",), device)
    shape = ("L + 1",) if label_rows is not None else (rows + 1,)
    label_offsets = check_index("label_offsets", label_offsets, shape, device)
    check_offsets("label_offsets", label_offsets, len(label_values), "E")
    lists = label_values, label_offsets
    if label_rows is None:
        label_rows = torch.arange(rows, device=device)
    else:
        label_rows = check_index("label_rows", label_rows, (rows,), device)
        check_range("label_rows", label_rows, len(label_offsets) - 1, NOT_SCORED)
    input = autocast_input(input)
    backend = resolve(backend, OP, device)
    kept = label_rows != NOT_SCORED
    # That kernel checks the values itself, many times as fast: they may be those of all items.
    trusted = backend == "cpp" and has_values(label_values) and has_values(label_offsets)
    if not trusted:
        _check_lists(*lists, labels)
    inputs = input, linear_weight, linear_bias, *lists, torch.where(kept, label_rows, -1)
    if backend == "reference":
        with without_autocast(device):
            loss = _losses_ref(*inputs)
        loss = loss if reduction == "none" else ordered_sum(loss)
    else:
        summed, learns = reduction != "none", torch.is_grad_enabled()
        try:
            loss = _MultilabelBce.apply(*inputs, summed, learns, backend)
        except RuntimeError:
            if trusted:
                _check_lists(*lists, labels)  # names what is wrong
            raise
    return _divided(loss, kept, labels, reduction)
