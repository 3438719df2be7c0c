# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy` with the items sharded over the ranks of a process group.

Legend: N scored rows, V items of all ranks, W items of this rank, D width, T rows of `input` before
selection, R ranks. Rows are the same on all ranks.

Every rank runs the kernels of the plain op on its items, with its first item as the target of rows
whose target another rank holds: such a row has weight 0 in everything that its target logit enters.
One collective brings lse_r and the logit of the target y to all ranks:

    lse = log sum_r exp(lse_r),    P_r = exp(lse_r - lse),    loss = lse - target_logit

With m_r = sum_j p_j W_j / P_r over the items of rank r, which the forward kernel returns as an
offset o_r = m_r - W_t from the row t that it took for the target, and h the rank that holds y,

    dx = sum_r P_r m_r - W_y = sum_r P_r o_r + sum_{r != h} P_r W_t - (1 - P_h) W_y

1 - P_h is the sum of the other P_r: nothing cancels when p_y is almost 1. The rows of dW need lse
only, and stay where they are.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fastrec.ops.common.arguments import accumulate_dtype, check_range, ordered_sum, split_sum
from fastrec.ops.common.collectives import Group, agree, gather, process_group, sum_over
from fastrec.ops.common.item_losses import spread_rows
from fastrec.ops.common.linear_cross_entropy_autograd import (
    add_class_gradient,
    class_sums,
    logits_ref,
    loss_of,
    zero_unscored,
)
from fastrec.ops.common.native import kernels_of
from fastrec.ops.common.second_order import once_differentiable


class Part(NamedTuple):
    """Where the items of this rank stand. Tensors, so that no host waits for a GPU."""

    group: Group
    rank: int
    ends: Tensor  # int64 [R], the first item of the next rank
    start: Tensor  # int64 []


def local_tensors(input: Tensor, linear_weight: Tensor, group, linear_bias, weight):
    """(table, process group, bias, class weights) of this rank, of tensors that may be DTensors
    sharded by rows."""
    if isinstance(input, DTensor):
        raise TypeError("input is a DTensor: pass a tensor with the same rows on all ranks")
    vectors = {"linear_bias": linear_bias, "weight": weight}
    if not isinstance(linear_weight, DTensor):
        for name, tensor in vectors.items():
            if isinstance(tensor, DTensor):
                raise TypeError(f"{name} is a DTensor, linear_weight is not")
        return linear_weight, process_group(group), linear_bias, weight
    mesh, placements = linear_weight.device_mesh, linear_weight.placements
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(split) != 1 or placements[split[0]] != Shard(0):
        raise ValueError(
            "linear_weight as a DTensor must be Shard(0) over one mesh dimension and replicated"
            f" over the others, got {placements}"
        )
    own = mesh.get_group(split[0])
    if group is not None and process_group(group) != own:
        raise ValueError("group is not the mesh dimension over which linear_weight is sharded")
    for name, tensor in vectors.items():
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != mesh or tensor.placements != placements:
                raise ValueError(f"{name} must be placed like linear_weight, {placements}")
            vectors[name] = tensor.to_local()
    return linear_weight.to_local(), own, *vectors.values()


def find_part(group: Group, linear_weight: Tensor, facts: dict[str, int | Tensor]) -> Part:
    """Exchange the sizes of the shards, and refuse `facts` that differ between ranks."""
    facts = {"the width": linear_weight.shape[1], **facts}
    place = torch.empty((), dtype=torch.int64, device=linear_weight.device)
    own = torch.stack(
        [
            # Not `as_tensor`, which waits for a GPU.
            value if isinstance(value, Tensor) else place.new_full((), int(value))
            for value in (linear_weight.shape[0], *facts.values())
        ]
    )
    seen = gather(own, group)
    agree(list(facts), seen[:, 1:])
    ends = seen[:, 0].cumsum(0)
    rank = dist.get_rank(group)
    return Part(group, rank, ends, ends[rank] - linear_weight.shape[0])


def fingerprint(values: Tensor) -> Tensor:
    """An int64 that almost surely differs for other values: ranks with other rows show up."""
    place = torch.arange(len(values), device=values.device)
    return ((values + 1) * (2654435761 * place + 1013904223)).sum()


def _fwd_ref(x, linear_weight, linear_bias, target, with_offset):
    dtype = accumulate_dtype(x)
    logits = logits_ref(x, linear_weight, linear_bias)
    top, y = logits.amax(1).clamp_min(torch.finfo(dtype).min), target.clamp_min(0)
    log_sum = (logits - top[:, None]).exp().sum(1).log()
    lse = torch.stack(split_sum(top, log_sum))
    offset = lse.new_empty(0, x.shape[1])
    if with_offset:
        w = linear_weight.to(dtype)
        p = (logits - top[:, None] - log_sum[:, None]).exp()
        offset = (p @ w - w[y]) * (target >= 0)[:, None]
    logit = logits.gather(1, y[:, None]).squeeze(1)
    return lse.masked_fill(target < 0, 0), logit.masked_fill(target < 0, 0), offset


def _bwd_ref(x, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit):
    logits = logits_ref(x, linear_weight, linear_bias)
    p = (logits - lse[0, :, None] - lse[1, :, None]).exp() * grad_lse[:, None]
    place = (torch.arange(len(p), device=p.device), target.clamp_min(0))
    p = p.index_put(place, grad_target_logit, accumulate=True)
    grad_bias = lse.new_empty(0) if linear_bias is None else p.sum(0).to(linear_bias.dtype)
    return (p.T @ x.to(p.dtype)).to(linear_weight.dtype), grad_bias


def _kernels(backend: str, device: torch.device):
    if backend == "reference":
        return _fwd_ref, _bwd_ref
    kernels = kernels_of("linear_cross_entropy", backend, device)
    return kernels.linear_cross_entropy_fwd, kernels.linear_cross_entropy_bwd


def _local_lse(x, linear_weight, linear_bias, target, with_offset, backend):
    """(lse_r [2, N], logit, offset) of the items of this rank, of which there may be none."""
    if linear_weight.shape[0] == 0:
        lse = x.new_full((2, len(x)), -torch.inf, dtype=accumulate_dtype(x))
        lse[1] = 0
        offset = lse.new_zeros(len(x) if with_offset else 0, x.shape[1])
        return lse, torch.zeros_like(lse[0]), offset
    fwd, _ = _kernels(backend, x.device)
    lse, logit, offset = fwd(x, linear_weight, linear_bias, target, with_offset)
    if linear_bias is not None:  # a bias of -inf takes an item out, and here perhaps all items
        out = (linear_bias == -torch.inf).all()
        lse[0].masked_fill_(out, -torch.inf)
        lse[1].masked_fill_(out, 0)
        offset = torch.where(out, 0, offset)
    return lse, logit, offset


class _ShardedCrossEntropy(torch.autograd.Function):
    """(lse, nll, sum_j class_weight_j s_ij, class weight of the target [N], sum of class_weight),
    the same on all ranks. target [N] counts in all items, -1 = not scored; `weight` and
    `class_weight` are those of this rank's items: of the rows, and of the smoothing."""

    @staticmethod
    def forward(
        ctx, input, linear_weight, linear_bias, target, rows, weight, class_weight, backend, part
    ):
        x = input if rows is None else input.index_select(0, rows)
        items, with_offset = linear_weight.shape[0], ctx.needs_input_grad[0]
        scored = target >= 0
        place = target - part.start
        mine = scored & (place >= 0) & (place < items)
        local = torch.where(mine, place, torch.where(scored, 0, -1))
        lse, logit, offset = _local_lse(x, linear_weight, linear_bias, local, with_offset, backend)
        parts = [*lse, logit.masked_fill(~mine, 0)]
        class_mean, total = None, lse.new_zeros(1)
        if class_weight is not None:
            class_mean, class_sum = lse.new_zeros(x.shape[1]), torch.zeros_like(logit)
            if items:
                class_mean, class_sum = class_sums(
                    x, linear_weight, linear_bias, local, class_weight
                )
            parts.append(class_sum)
            total = ordered_sum(class_weight)[None]
        if weight is not None and items:
            parts.append(weight[local.clamp_min(0)].masked_fill(~mine, 0))
        elif weight is not None:
            parts.append(torch.zeros_like(logit))
        sent = gather(torch.cat([*parts, total]), part.group)
        every = sent[:, :-1].unflatten(1, (len(parts), -1))  # [R, parts, N]

        # lse of all items, and the shares of this rank and of those without the target: exp of
        # differences of the rounded parts and of what their rounding left out, taken apart.
        top = every[:, 0].amax(0).clamp_min(torch.finfo(lse.dtype).min)
        shares = (every[:, 0] - top).add_(every[:, 1]).exp_()
        sums = shares.sum(0)
        whole = torch.stack(split_sum(top, sums.log())).masked_fill(~scored, 0)
        holder = torch.searchsorted(part.ends, target.clamp_min(0), right=True)[None]
        others = shares.scatter(0, holder, 0).sum(0) / sums
        share = shares[part.rank] / sums
        logit = every[:, 2].sum(0)
        rest = list(every[:, 3:].sum(0))
        class_sum = torch.zeros_like(logit) if class_weight is None else rest.pop(0)
        row_weight = scored.to(lse.dtype) if weight is None else rest.pop(0)

        ctx.save_for_backward(
            x, linear_weight, linear_bias, target, local, mine, rows, class_weight, whole,
            share, others, offset, class_mean,
        )  # fmt: skip
        ctx.backend, ctx.input_shape, ctx.part = backend, input.shape, part
        class_total = sent[:, -1].sum()
        ctx.mark_non_differentiable(row_weight, class_total)
        return whole[0], loss_of(whole, logit), class_sum, row_weight, class_total

    @staticmethod
    @once_differentiable("linear_cross_entropy with a group")
    def backward(ctx, grad_lse, grad_nll, grad_class_sum, _weight, _total):
        (
            x, linear_weight, linear_bias, target, local, mine, rows, class_weight, lse, share,
            others, offset, class_mean,
        ) = ctx.saved_tensors  # fmt: skip
        scored = target >= 0
        grad_lse, grad_nll, grad_class_sum = (
            grad.masked_fill(~scored, 0) for grad in (grad_lse, grad_nll, grad_class_sum)
        )
        items, through_lse = linear_weight.shape[0], grad_lse + grad_nll
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad = offset * (share * through_lse)[:, None]
            if items:
                taken = linear_weight.index_select(0, local.clamp_min(0)).to(lse.dtype)
                times = grad_lse * share + grad_nll * torch.where(mine, -others, share)
                grad = torch.addcmul(grad, taken, times[:, None])
            if class_mean is not None:
                grad = torch.addcmul(grad, class_mean, grad_class_sum[:, None])
            grad = grad.masked_fill(~scored[:, None], 0)
            grad = sum_over(grad, ctx.part.group).to(x.dtype)
            grad_input = spread_rows(grad, rows, ctx.input_shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if items:
                _, bwd = _kernels(ctx.backend, x.device)
                grad_weight, grad_bias = bwd(
                    x, linear_weight, linear_bias, local, lse, through_lse.contiguous(),
                    -grad_nll * mine,
                )  # fmt: skip
                if class_weight is not None:
                    known = zero_unscored(x, target)
                    grad_bias = add_class_gradient(
                        grad_weight, grad_bias, known, linear_bias, class_weight, grad_class_sum
                    )
            else:
                grad_weight = torch.zeros_like(linear_weight)
                grad_bias = None if linear_bias is None else torch.zeros_like(linear_bias)
        return (
            grad_input,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            *[None] * 6,
        )


def sharded_rows(
    input, linear_weight, linear_bias, target, rows, weight, smoothed, backend, group
) -> tuple[Tensor, ...]:
    """(lse, lse - target_logit, mean over all items of `smoothed` x (lse - logit), class weight of
    the target), [N] and the same on all ranks. target [N] counts in all items, -1 = not scored.
    `weight` and `smoothed` [W], the class weights of the targets and of the smoothing, are in the
    accumulation dtype or None."""
    facts = {
        "the number of rows": len(target),
        "the targets": fingerprint(target),
        "the scored rows": 0 if rows is None else fingerprint(rows),
        "having class weights": weight is not None,
        "smoothing labels": smoothed is not None,
        "whether input needs a gradient": torch.is_grad_enabled() and input.requires_grad,
    }
    part = find_part(group, linear_weight, facts)
    items = part.ends[-1]
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        if items == 0:
            raise ValueError("linear_weight has no rows on any rank: there is no item to score")
        check_range("target", target, int(items), ignored=-1)
    else:
        inside = (target < items).all() & (target >= -1).all()
        torch._assert_async(inside, "linear_cross_entropy: target outside all shards")
    lse, nll, class_sum, row_weight, class_total = _ShardedCrossEntropy.apply(
        input, linear_weight, linear_bias, target, rows, weight, smoothed, backend, part
    )
    return lse, nll, (class_total * lse - class_sum) / items, row_weight
