# SPDX-License-Identifier: Apache-2.0
"""Schemas and autograd of `linear_cross_entropy`.

Legend: N scored rows, V items, D width, T rows of `input` before selection.

The kernels know one function of the logits s_ij = x_i . W_j + b_j and its derivative:

    lse_i = logsumexp_j s_ij,   target_logit_i = s_i,y_i,   p_ij = exp(s_ij - lse_i)
    dx_i = grad_lse_i * sum_j p_ij W_j + grad_target_i * W_y
    dW_j = sum_i grad_lse_i * p_ij * x_i + sum_{i: y_i = j} grad_target_i * x_i,  db_j without x_i

Class weights, smoothing, z-loss and reductions are arithmetic on these [N] vectors. The forward
kernel also returns mean_offset_i = sum_j p_ij (W_j - W_y), so dx needs no second sweep over the
items. As an offset, because W_y cancels in the gradient of the usual loss: kernels that round the
table subtract the row that they multiplied with, which the caller does not have.

A mean or a sum without smoothing and z-loss is known up to the scalar that backward gets. For few
items one cpp kernel computes that loss and its gradients in forward, and backward scales them: the
exponentials of a chunk of rows stay in a cache, so the scores need not be computed twice.
"""

import torch
from torch import Tensor

from fastrec.ops.common.arguments import accumulate_dtype, ordered_sum
from fastrec.ops.common.item_losses import reduce_loss
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.products import products, weighted_rows
from fastrec.ops.common.second_order import twice_differentiable

OP = "linear_cross_entropy"

# target [N] int64, -1 = row not scored: its outputs are 0 and it contributes no gradient. lse
# [2, N] (rounded, and what rounding left out), target_logit [N] and mean_offset [N, D] ([0, D] if
# not asked for) are float32 or float64 with it.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " bool with_offset) -> (Tensor lse, Tensor target_logit, Tensor mean_offset)",
)
# grad_weight [V, D] and grad_bias [V] ([0] if None) have the dtypes of the table and its bias.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor lse,"
    " Tensor grad_lse, Tensor grad_target_logit) -> (Tensor grad_weight, Tensor grad_bias)",
)
# Beyond this many items the stored exponentials leave the caches: see docs/kernels.
STORED_ITEMS = 32768

# The plain sum or mean of class weight x (lse - target_logit) over the rows with target !=
# ignore_index, and its gradients ([0, D] or [0] for those that are not asked for). cpp only.
torch.library.define(
    f"fastrec::{OP}_value_and_grad",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " int ignore_index, bool mean, bool with_input, bool with_weight)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, target, with_offset):
    rows, width = input.shape
    out = input.new_empty(rows, dtype=accumulate_dtype(input))
    return out.new_empty(2, rows), out, out.new_empty(rows if with_offset else 0, width)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit):
    # Contiguous, whatever the strides of the inputs are.
    grad_bias = (
        lse.new_empty(0) if linear_bias is None else linear_bias.new_empty(linear_bias.shape)
    )
    return linear_weight.new_empty(linear_weight.shape), grad_bias


@torch.library.register_fake(f"fastrec::{OP}_value_and_grad")
def _(
    input, linear_weight, linear_bias, target, weight, ignore_index, mean, with_input, with_weight
):
    rows, (items, width) = input.shape[0], linear_weight.shape
    return (
        input.new_empty(()),
        input.new_empty(rows if with_input else 0, width),
        linear_weight.new_empty(items if with_weight else 0, width),
        linear_weight.new_empty(items if with_weight and linear_bias is not None else 0),
    )


register_cuda(OP, "fwd", "bwd")


def zero_unscored(x: Tensor, target: Tensor) -> Tensor:
    """`x`, 0 where not scored: 0 times what such a row holds need not be 0."""
    return x.masked_fill((target < 0).unsqueeze(-1), 0)


def class_sums(x, linear_weight, linear_bias, target, class_weight) -> tuple[Tensor, Tensor]:
    """(sum_j class_weight_j W_j [D], sum_j class_weight_j s_ij [N], 0 where not scored)."""
    dtype, x = class_weight.dtype, zero_unscored(x, target)
    # A sum over the items overflows float16: not in the dtype of autocast, and in pieces, because
    # a whole table in float32 is large.
    with torch.autocast(x.device.type, enabled=False):
        pieces = zip(class_weight.split(65536), linear_weight.split(65536), strict=True)
        class_mean = class_weight.new_zeros(linear_weight.shape[1])
        for a, w in pieces:
            class_mean = class_mean + weighted_rows(a, w.to(dtype))
        class_sum = products(x.to(dtype), class_mean).masked_fill(target < 0, 0)
        if linear_bias is not None:
            bias = ordered_sum(class_weight * linear_bias.to(dtype))
            class_sum = class_sum + torch.where(target >= 0, bias, 0)  # -inf * 0 is NaN
    return class_mean, class_sum


def add_class_gradient(
    grad_weight, grad_bias, x, linear_bias, class_weight, grad_class_sum
) -> Tensor:
    """Adds the gradient of `class_sums` to grad_weight; returns grad_bias with its own."""
    # The same rank-1 term for every row: no second [V, D] buffer. Not addr_, whose bits depend on
    # the number of threads.
    with torch.autocast(x.device.type, enabled=False):  # backward may run under any
        direction = weighted_rows(grad_class_sum, x.to(class_weight.dtype)).to(grad_weight.dtype)
    grad_weight.addcmul_(class_weight[:, None].to(grad_weight.dtype), direction)
    if linear_bias is None:
        return grad_bias
    return grad_bias + (class_weight * ordered_sum(grad_class_sum)).to(grad_bias.dtype)


def loss_of(lse: Tensor, target_logit: Tensor) -> Tensor:
    """lse - target_logit with all digits of both parts of lse [2, N]."""
    return (lse[0] - target_logit) + lse[1]


def logits_ref(x, linear_weight, linear_bias) -> Tensor:
    dtype = accumulate_dtype(x)
    logits = x.to(dtype) @ linear_weight.to(x.dtype).to(dtype).T
    return logits if linear_bias is None else logits + linear_bias.to(dtype)


def _losses_ref(x, linear_weight, linear_bias, target) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, lse, lse - target_logit), the last two 0 where not scored."""
    logits = logits_ref(zero_unscored(x, target), linear_weight, linear_bias)
    nll = -logits.log_softmax(1).gather(1, target.clamp_min(0)[:, None]).squeeze(1)
    out = target < 0
    return logits, logits.logsumexp(1).masked_fill(out, 0), nll.masked_fill(out, 0)


def _recompute(ctx, x, linear_weight, linear_bias, target, class_weight, lse, offset, class_mean):
    inputs = x, linear_weight, linear_bias
    logits, lse, nll = _losses_ref(*inputs, target)
    if class_weight is None:
        return inputs, (lse, nll, torch.zeros_like(lse))
    return inputs, (lse, nll, (logits @ class_weight).masked_fill(target < 0, 0))


def _recompute_plain(ctx, x, linear_weight, linear_bias, target, weight, *grads):
    inputs = x, linear_weight, linear_bias
    kept = target != ctx.ignore_index
    *_, nll = _losses_ref(*inputs, torch.where(kept, target, -1))
    row_weight = kept.to(nll.dtype)
    if weight is not None:
        row_weight = row_weight * weight[torch.where(kept, target, 0)]
    return inputs, (reduce_loss(nll * row_weight, row_weight, "mean" if ctx.mean else "sum"),)


class LinearCrossEntropy(torch.autograd.Function):
    """(lse, lse - target_logit, class_sum), class_sum_i = sum_j class_weight_j s_ij (0 if None).

    pending: a list that backward appends what the gradient of the table is made of to, or None.
    """

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, target, class_weight, backend, pending=None):
        fwd = kernels_of(OP, backend, x.device).linear_cross_entropy_fwd
        lse, target_logit, mean_offset = fwd(
            x, linear_weight, linear_bias, target, ctx.needs_input_grad[0]
        )
        class_mean, class_sum = None, torch.zeros_like(target_logit)
        if class_weight is not None:
            class_mean, class_sum = class_sums(x, linear_weight, linear_bias, target, class_weight)
        ctx.save_for_backward(
            x, linear_weight, linear_bias, target, class_weight, lse, mean_offset, class_mean
        )
        ctx.backend, ctx.pending = backend, pending
        return lse[0], loss_of(lse, target_logit), class_sum

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_lse, grad_nll, grad_class_sum):
        x, linear_weight, linear_bias, target, class_weight, *rest = ctx.saved_tensors
        lse, mean_offset, class_mean = rest
        bwd = kernels_of(OP, ctx.backend, x.device).linear_cross_entropy_bwd
        scored = (target >= 0).to(lse.dtype)
        grad_target_logit = (-grad_nll * scored).contiguous()
        grad_lse = (grad_lse * scored - grad_target_logit).contiguous()
        grad_class_sum = grad_class_sum * scored
        if ctx.pending is not None:
            ctx.pending.append((x.detach(), target, lse, grad_lse, grad_target_logit))
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad = mean_offset * grad_lse[:, None]
            target_rows = linear_weight.index_select(0, target.clamp_min(0)).to(lse.dtype)
            grad = torch.addcmul(grad, target_rows, (grad_lse + grad_target_logit)[:, None])
            if class_mean is not None:
                grad = torch.addcmul(grad, class_mean, grad_class_sum[:, None])
            grad_input = grad.to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = bwd(
                x, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit
            )
            if class_weight is not None:
                rows = zero_unscored(x, target)
                grad_bias = add_class_gradient(
                    grad_weight, grad_bias, rows, linear_bias, class_weight, grad_class_sum
                )
        return (
            grad_input,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            *[None] * 4,
        )


class PlainLoss(torch.autograd.Function):
    """The sum or mean of the losses; float32 or float64 throughout, so that scaling the gradients
    in backward neither overflows nor underflows."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, ignore_index, mean):
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss, *grads = torch.ops.fastrec.linear_cross_entropy_value_and_grad(
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            ignore_index,
            mean,
            needs_input,
            needs_weight or needs_bias,
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, *grads)
        ctx.ignore_index, ctx.mean = ignore_index, mean
        return loss

    @staticmethod
    @twice_differentiable(_recompute_plain)
    def backward(ctx, grad_loss):
        grads = zip(ctx.saved_tensors[5:], ctx.needs_input_grad, strict=False)
        return *(grad * grad_loss if needed else None for grad, needed in grads), *[None] * 4
