# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear layer over the target and sampled negatives.

Legend: N scored rows, V items, D width, K negatives, T rows of `input` before selection, U distinct
items among targets and negatives.

With s_iv = x_i . W_v + b_v - log_q_v, the kernels know two functions of the scores of a row, its
target y and its negatives j (those that are the target left out), and their derivatives:

    softmax: loss_i = log(1 + sum_j exp(s_ij - s_iy)),  binary: see `sampled_linear_cross_entropy`
    dx_i = sum_j c_ij W_j + c_iy W_y,  dW_v = sum over the pairs (i, v) of c_iv x_i,  c = dloss / ds

Forward reads the rows of the table once, for the scores and for dx. Negatives of every row ([N, K])
keep their c_ij, half the size of their ids; shared ones ([K]) compute their scores again in
backward. dW is summed over the pairs sorted by item, in the order of the rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    autocast_input,
    check_index,
    check_number,
    check_range,
    check_tensor,
)
from fastrec.ops.common.distinct_rows import sparse_rows
from fastrec.ops.common.item_losses import (
    check_arguments,
    reduce_loss,
    scored_rows,
    select_rows,
)
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import twice_differentiable

OP = "sampled_linear_cross_entropy"
LOSSES = ("softmax", "bce", "gbce")
_INPUTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? log_q, Tensor target,"
    " Tensor negatives"
)

# target [N] int64, -1 = row not scored: its outputs are 0. beta: of the binary loss, negative for
# the softmax. The outputs have the accumulating dtype: loss [N], dloss_i / dx_i [N, D] ([0, D] if
# not asked for), c_iy [N], c_ij [N, K] ([0, K] if not asked for, or for shared negatives) and what
# the softmax of shared negatives needs in backward, lse [2, N]: rounded, and what that left out.
torch.library.define(
    f"fastrec::{OP}_fwd",
    f"({_INPUTS}, float beta, bool with_input, bool with_weight) -> (Tensor loss,"
    " Tensor grad_input, Tensor grad_target, Tensor grad_negatives, Tensor lse)",
)
# grad_weight [V, D] and grad_bias [V] ([0] if None) have the dtypes of the table and its bias. If
# sparse, they are those of the U items `index`, ascending; else `index` is [0].
torch.library.define(
    f"fastrec::{OP}_bwd",
    f"({_INPUTS}, Tensor grad_target, Tensor grad_negatives, Tensor lse, Tensor grad_loss,"
    " float beta, bool sparse) -> (Tensor index, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(input, linear_weight, linear_bias, log_q, target, negatives, beta, with_input, with_weight):
    rows, width = input.shape
    loss = input.new_empty(rows, dtype=accumulate_dtype(input))
    kept = rows if with_weight and negatives.dim() == 2 else 0
    return (
        loss,
        loss.new_empty(rows if with_input else 0, width),
        torch.empty_like(loss),
        loss.new_empty(kept, negatives.shape[-1]),
        loss.new_empty(2, rows),
    )


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(
    input, linear_weight, linear_bias, log_q, target, negatives, grad_target, grad_negatives, lse,
    grad_loss, beta, sparse,
):  # fmt: skip
    items, width = linear_weight.shape
    if sparse:
        items = torch.library.get_ctx().new_dynamic_size()
    bias = lse.new_empty(0) if linear_bias is None else linear_bias.new_empty(items)
    index = target.new_empty(items if sparse else 0)
    return index, linear_weight.new_empty(items, width), bias


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, x, linear_weight, linear_bias, log_q, target, negatives, *results):
    losses = _losses_ref(x, linear_weight, target, negatives, linear_bias, log_q, ctx.beta)
    return (x, linear_weight, linear_bias), (losses.masked_fill(target < 0, 0),)


class _SampledLoss(torch.autograd.Function):
    """loss [N] of the rows; `learns`: whether gradients will be asked for."""

    @staticmethod
    def forward(
        ctx, x, linear_weight, linear_bias, log_q, target, negatives, beta, sparse, learns, backend
    ):
        fwd = kernels_of(OP, backend, x.device).sampled_linear_cross_entropy_fwd
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss, *grads = fwd(
            x, linear_weight, linear_bias, log_q, target, negatives, beta,
            learns and needs_input, learns and (needs_weight or needs_bias),
        )  # fmt: skip
        ctx.save_for_backward(x, linear_weight, linear_bias, log_q, target, negatives, *grads)
        ctx.beta, ctx.sparse, ctx.backend = beta, sparse, backend
        return loss

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_loss):
        x, linear_weight, linear_bias, log_q, target, negatives, *grads = ctx.saved_tensors
        per_row, grad_target, grad_negatives, lse = grads
        bwd = kernels_of(OP, ctx.backend, x.device).sampled_linear_cross_entropy_bwd
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = (per_row * grad_loss[:, None]).to(x.dtype)
        if needs_weight or needs_bias:
            index, grad_weight, grad_bias = bwd(
                x, linear_weight, linear_bias, log_q, target, negatives, grad_target,
                grad_negatives, lse, grad_loss.contiguous(), ctx.beta, ctx.sparse,
            )  # fmt: skip
            if ctx.sparse:
                grad_weight, grad_bias = (
                    sparse_rows(index, grad, (linear_weight.shape[0], *grad.shape[1:]))
                    if needed
                    else None
                    for grad, needed in ((grad_weight, needs_weight), (grad_bias, needs_bias))
                )
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *[None] * 7,
        )


def _beta(loss: str, gbce_t: float, negatives: int, items: int) -> float:
    """The power of the positive probability; negative for the softmax."""
    if loss == "softmax":
        return -1.0
    if loss == "bce":
        return 1.0
    sampling_rate = min(negatives / max(items - 1, 1), 1.0)
    return 1.0 - gbce_t * (1.0 - sampling_rate)


def sampled_linear_cross_entropy_ref(
    input,
    linear_weight,
    target,
    negatives,
    *,
    linear_bias=None,
    log_q=None,
    weight=None,
    loss="softmax",
    gbce_t=0.75,
    reduction="mean",
    ignore_index=-100,
    rows=None,
    num_items=None,
    sparse_grad=False,
):
    """The oracle: plain PyTorch, any dtype, materialises the [N, K + 1, D] rows of the table."""
    if rows is not None and rows.dtype == torch.bool:
        target = torch.where(rows, target, ignore_index)
    elif rows is not None:
        input = input[rows]
    kept = target != ignore_index
    y = torch.where(kept, target, -1)
    beta = _beta(loss, gbce_t, negatives.shape[-1], num_items or linear_weight.shape[0])
    losses = _losses_ref(input, linear_weight, y, negatives, linear_bias, log_q, beta, sparse_grad)
    row_weight = kept.to(losses.dtype)
    if weight is not None:
        row_weight = row_weight * weight.detach().to(losses.dtype)[y.clamp_min(0)]
    return reduce_loss(torch.where(kept, losses * row_weight, 0), row_weight, reduction)


def _losses_ref(
    input, linear_weight, target, negatives, linear_bias, log_q, beta, sparse_grad=False
) -> Tensor:
    """Of rows whose target is -1 something finite: neither they nor item 0 need be."""
    y, out = target.clamp_min(0), (target < 0)[:, None]
    input = input.masked_fill(out, 0)
    drawn = negatives.expand(len(y), -1) if negatives.dim() == 1 else negatives
    candidates = torch.cat([y[:, None], drawn], 1)
    table = F.embedding(candidates, linear_weight, sparse=sparse_grad)
    table = table.masked_fill(out[:, :, None], 0)
    scores = (table.to(input.dtype) @ input[:, :, None]).squeeze(2).to(accumulate_dtype(input))
    if linear_bias is not None:
        bias = linear_bias.gather(0, candidates.flatten(), sparse_grad=sparse_grad)
        scores = scores + bias.view(candidates.shape).to(scores.dtype)
    if log_q is not None:
        scores = scores - log_q.detach().to(scores.dtype)[candidates]
    scores = scores.masked_fill(out, 0)
    hit = candidates == y[:, None]
    hit[:, 0] = False
    if beta < 0:  # softmax
        return -torch.log_softmax(scores.masked_fill(hit, -torch.inf), 1)[:, 0]
    negative = F.softplus(scores[:, 1:]).masked_fill(hit[:, 1:], 0).sum(1)
    return (beta * F.softplus(-scores[:, 0]) + negative) / candidates.shape[1]


def _check_sampled(linear_weight, log_q, loss, gbce_t, num_items):
    if num_items is not None:
        check_number("num_items", num_items, whole=True)
    if num_items is not None and num_items < len(linear_weight):
        raise ValueError(f"num_items is {num_items}, linear_weight has {len(linear_weight)} rows")
    if log_q is not None:
        check_tensor("log_q", log_q, linear_weight.shape[:1], device=linear_weight.device)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    check_number("gbce_t", gbce_t)
    if not 0.0 <= gbce_t <= 1.0:
        raise ValueError(f"gbce_t must be in [0, 1], got {gbce_t}")


def _flat_negatives(negatives: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """int64 [K] or [N, K] of negatives of targets of a shape."""
    shared = isinstance(negatives, Tensor) and negatives.dim() == 1
    negatives = check_index("negatives", negatives, ("K",) if shared else (*shape, "K"), device)
    if negatives.shape[-1] == 0:
        raise ValueError("negatives has no columns: K must be at least 1")
    return negatives if shared else negatives.reshape(-1, negatives.shape[-1])


def sampled_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    negatives: Tensor,
    *,
    linear_bias: Tensor | None = None,
    log_q: Tensor | None = None,
    weight: Tensor | None = None,
    loss: str = "softmax",
    gbce_t: float = 0.75,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    rows: Tensor | None = None,
    num_items: int | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of `input[rows] @ linear_weight.T + linear_bias` over the target of each row
    and sampled negatives; the gathered rows of the table are never stored.

    With s_iv = x_i . W_v + b_v - log_q_v, a_i = weight[target_i] (1 without `weight`, 0 for ignored
    rows) and j over the K negatives of row i without those that are its target (accidental hits):

        softmax: loss_i = a_i log(1 + sum_j exp(s_ij - s_iy))
        bce:     loss_i = a_i (softplus(-s_iy) + sum_j softplus(s_ij)) / (K + 1)
        gbce:    the same with the first term times beta = 1 - gbce_t (1 - K / (V - 1))

    A negative that is drawn twice counts twice. A row whose negatives are all hits has a softmax
    loss and gradient of 0. softmax with log_q is the sampled softmax of Bengio and Senecal (2008)
    in the form of Yi et al. (RecSys 2019, eq. 3): the scores of target and negatives are both
    corrected, so a constant added to `log_q` changes nothing (log K may be left out). bce with
    log_q + log K is noise-contrastive estimation. bce is the loss of SASRec (twice it, for K = 1);
    gbce is gSASRec's (Petrov and Macdonald, RecSys 2023, eq. 9 and 13) with the power taken as a
    factor of the logarithm.

    Args:
        input: [T, D], float64, float32, bfloat16 or float16; [..., D] counts as its rows.
        linear_weight: item table [V, D], same dtype, or float32 beside a low-precision input.
        target: item ids in [0, V), one per scored row: [N] for index `rows`, else [T], or [...]
            like the input. Ids and `rows` are int64, or int32, which is converted.
        negatives: item ids in [0, V): [K], the same for all rows, or K for every target, [N, K].
        linear_bias: [V].
        log_q: [V], log of the probability (or expected count) with which an item is drawn, not
            differentiated. Finite for targets; see `fastrec.data.negatives`.
        weight: weights of the rows by target [V], not differentiated.
        loss: "softmax", "bce" or "gbce".
        gbce_t: calibration of gbce in [0, 1]; 0 is bce, 1 gives the probabilities of the softmax.
        reduction: "mean" (divided by sum of a_i, by 1 when that is 0), "sum" or "none".
        ignore_index: target value of rows that are not scored: loss 0, no gradient. None is -100,
            as in torch.
        rows: positions in the T rows to score: [N] (repeats allowed), or a bool mask [T] or [...].
        num_items: V of beta, where `linear_weight` is a part of the table; its rows if None.
        sparse_grad: the gradients of `linear_weight` and `linear_bias` are sparse tensors of the
            items that occur, each once (but for the reference backend), for
            `torch.optim.SparseAdam`; on a GPU the host waits for their number.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        float32 (float64 for float64 input): a scalar, or like `target` for "none" (0 where a mask
        is False). Gradients have the dtype of their tensor; products accumulate in
        float32, and the rows of a gradient are summed in a fixed order.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        IndexError: a target, a negative or a row is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    check_number("ignore_index", ignore_index, whole=True)
    input, target, rows, shape = scored_rows(input, target, rows)
    input = autocast_input(input)
    check_arguments(input, linear_weight, linear_bias, weight, reduction, 0.0)
    _check_sampled(linear_weight, log_q, loss, gbce_t, num_items)
    negatives = _flat_negatives(negatives, shape, input.device)
    check_range("target", target, linear_weight.shape[0], ignore_index)
    check_range("negatives", negatives, linear_weight.shape[0])
    if rows is not None and rows.dtype == torch.int64:
        check_range("rows", rows, input.shape[0])
    backend = resolve(backend, OP, input.device)
    if backend == "reference":
        losses = sampled_linear_cross_entropy_ref(
            input,
            linear_weight,
            target,
            negatives,
            linear_bias=linear_bias,
            log_q=log_q,
            weight=weight,
            loss=loss,
            gbce_t=gbce_t,
            reduction=reduction,
            ignore_index=ignore_index,
            rows=rows,
            num_items=num_items,
            sparse_grad=sparse_grad,
        )
        return losses.view(shape) if reduction == "none" else losses
    if rows is not None and rows.dtype == torch.bool:
        target, rows = torch.where(rows, target, ignore_index), None
    kept = target != ignore_index
    y = torch.where(kept, target, -1)
    beta = _beta(loss, gbce_t, negatives.shape[-1], num_items or linear_weight.shape[0])
    losses = _SampledLoss.apply(
        select_rows(input, rows), linear_weight, linear_bias,
        None if log_q is None else log_q.detach(), y, negatives,
        beta, sparse_grad, torch.is_grad_enabled(), backend,
    )  # fmt: skip
    row_weight = kept.to(losses.dtype)
    if weight is not None:
        row_weight = row_weight * weight.detach().to(losses.dtype)[y.clamp_min(0)]
        losses = losses * row_weight
    losses = reduce_loss(losses, row_weight, reduction)
    return losses.view(shape) if reduction == "none" else losses
