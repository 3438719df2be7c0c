# SPDX-License-Identifier: Apache-2.0
"""Schemas and autograd of `in_batch_cross_entropy`.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.

Every similarity is a product after centring and scaling (`in_batch_pairs.operands`), so the kernels
know one function of the logits s_ij = x_i . c_j + b_j, its positive t_i and the pairs left out:

    loss_i = log(1 + sum_{j != t} exp(s_ij - s_it)),  p_ij = exp(s_ij - s_it - loss_i)
    dx_i = g_i (sum_{j != t} p_ij c_j - (1 - p_it) c_t)
    G_ij = g_i (p_ij - [j = t_i]),  dc_j = sum_i G_ij x_i,  db_j = sum_i G_ij

The positive stays out of the sum: where all other candidates are left out, loss and gradients are
exactly 0. The forward kernel returns dx_i / g_i, so that it needs no second sweep.
"""

import torch

from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.common.in_batch_pairs import allowed_ref
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable

OP = "in_batch_cross_entropy"

# A logit is query_i . candidate_j + bias_j. positive [B], -1 = row not scored: loss 0, no gradient.
# query_group [B, G] with candidate_group [C, G] and exclude_values [E] with exclude_offsets [B + 1]
# leave pairs out. loss [B], lse [2, B] (rounded, and what rounding left out) and direction [B, D]
# (the gradient of the loss with respect to the query, [0, D] if not asked for) are float32, or
# float64 with the query.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor query, Tensor candidate, Tensor? bias, Tensor positive, Tensor? query_group,"
    " Tensor? candidate_group, Tensor? exclude_values, Tensor? exclude_offsets,"
    " bool with_direction) -> (Tensor loss, Tensor lse, Tensor direction)",
)
# grad_candidate [C, D] and grad_bias [C] ([0] if None) have the dtype of the loss.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor query, Tensor candidate, Tensor? bias, Tensor positive, Tensor? query_group,"
    " Tensor? candidate_group, Tensor? exclude_values, Tensor? exclude_offsets, Tensor loss,"
    " Tensor lse, Tensor grad_loss) -> (Tensor grad_candidate, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(query, candidate, bias, positive, qg, cg, values, offsets, with_direction):
    rows, width = query.shape
    loss = query.new_empty(rows, dtype=accumulate_dtype(query))
    return loss, loss.new_empty(2, rows), loss.new_empty(rows if with_direction else 0, width)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(query, candidate, bias, positive, qg, cg, values, offsets, loss, lse, grad_loss):
    grad_bias = loss.new_empty(0 if bias is None else candidate.shape[0])
    return loss.new_empty(candidate.shape), grad_bias


register_cuda(OP, "fwd", "bwd")


def _recompute(
    ctx, query, candidate, bias, positive, query_group, candidate_group, values, offsets, *results
):  # fmt: skip
    logits = query @ candidate.T
    logits = logits if bias is None else logits + bias
    exclude = None if values is None else (values, offsets)
    scored = positive.clamp_min(0)
    rules = query_group, candidate_group, exclude
    allowed = allowed_ref(logits.shape, scored, *rules, query.device)
    log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
    loss = -log_p.gather(1, scored[:, None]).squeeze(1)
    return (query, candidate, bias), (loss.masked_fill(positive < 0, 0),)


class InBatchCrossEntropy(torch.autograd.Function):
    """Loss [B] of logits query_i . candidate_j + bias_j; `rules` are the exclusions."""

    @staticmethod
    def forward(ctx, query, candidate, bias, positive, dtype, backend, *rules):
        fwd = kernels_of(OP, backend, query.device).in_batch_cross_entropy_fwd
        pairs = (bias, positive, *rules)
        loss, lse, direction = fwd(
            query.to(dtype), candidate.to(dtype), *pairs, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(query, candidate, *pairs, loss, lse, direction)
        ctx.dtype, ctx.backend = dtype, backend
        return loss

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_loss):
        query, candidate, *pairs, loss, lse, direction = ctx.saved_tensors
        grad_query = grad_candidate = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_query = direction * grad_loss[:, None]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            bwd = kernels_of(OP, ctx.backend, grad_loss.device).in_batch_cross_entropy_bwd
            query, candidate = query.to(ctx.dtype), candidate.to(ctx.dtype)
            grad_candidate, grad_bias = bwd(
                query, candidate, *pairs, loss, lse, grad_loss.contiguous()
            )
            grad_bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_query, grad_candidate, grad_bias, *[None] * 7
