# SPDX-License-Identifier: Apache-2.0
"""The largest value of each feature over the events of a sequence.

Legend: B sequences, T events, D width.

    output_bd = max over the events t of sequence b that count of values_td

The gradient of output_bd goes to the first event that attains the maximum; the kernels save which
one that is. Backward writes every element of the gradient once: no atomics, no scatter-add.
"""

import torch
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    BOOL,
    check_index,
    check_offsets,
    check_tensor,
    is_nested,
    jagged_parts,
)
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import leaf, twice_differentiable

OP = "jagged_max_pool"

# output [B, D]; index int32 [B, D]: the event inside its sequence, from 0; -1 where none counts.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor values, Tensor offsets, Tensor? mask) -> (Tensor output, Tensor index)",
)
# grad_values [events, D] has the dtype of grad_output.
torch.library.define(
    f"fastrec::{OP}_bwd",
    "(Tensor grad_output, Tensor index, Tensor offsets, SymInt events) -> Tensor",
)


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(values, offsets, mask):
    size = (offsets.shape[0] - 1, values.shape[1])
    return values.new_empty(size), values.new_empty(size, dtype=torch.int32)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad_output, index, offsets, events):
    return grad_output.new_empty(events, grad_output.shape[1])


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, index, offsets):
    width = index.shape[1]
    values = leaf((ctx.events, width), index, ctx.dtype)
    # Row T stands for nothing to choose from.
    row = torch.where(index < 0, ctx.events, offsets[:-1, None] + index)
    return (values,), (torch.cat([values, values.new_zeros(1, width)]).gather(0, row),)


class _JaggedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, offsets, mask, backend):
        fwd = kernels_of(OP, backend, values.device).jagged_max_pool_fwd
        output, index = fwd(values, offsets, mask)
        ctx.save_for_backward(index, offsets)
        ctx.events, ctx.backend, ctx.dtype = values.shape[0], backend, values.dtype
        return output

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad_output):
        index, offsets = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, grad_output.device).jagged_max_pool_bwd
        return bwd(grad_output, index, offsets, ctx.events), None, None, None


def jagged_max_pool_ref(values, offsets, mask=None):
    """The oracle: plain PyTorch, any dtype."""
    events, sequences = values.shape[0], offsets.shape[0] - 1
    event = torch.arange(events, device=values.device).unsqueeze(1).expand_as(values)
    ends = offsets[1:].contiguous()
    # Events behind the last offset, which a GPU and torch.compile let pass, are one more segment.
    segment = torch.searchsorted(ends, event[:, :1].contiguous(), right=True)
    segment = segment.expand_as(values)
    counted = values.detach()
    if mask is not None:
        counted = counted.masked_fill(~mask.unsqueeze(1), -torch.inf)
    top = counted.new_full((sequences + 1, values.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, segment, counted, "amax")
    largest = (counted == top.gather(0, segment)) | counted.isnan()
    if mask is not None:
        largest = largest & mask.unsqueeze(1)
    first = event.new_full(top.shape, events)
    first = first.scatter_reduce(0, segment, event.masked_fill(~largest, events), "amin")
    first = first[:sequences]
    # Row T stands for nothing to choose from: a zero without a gradient.
    return torch.cat([values, values.new_zeros(1, values.shape[1])]).gather(0, first)


def _check(values, offsets, mask):
    """offsets as int64."""
    check_tensor("values", values, ("T", "D"))
    offsets = check_index("offsets", offsets, ("B + 1",), values.device)
    check_offsets("offsets", offsets, values.shape[0], "T")
    if mask is not None:
        check_tensor("mask", mask, values.shape[:1], BOOL, values.device)
    return offsets


def jagged_max_pool(
    values: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Largest value of each feature over the events of each sequence (UPRec, Xiao et al., eq. 8).

        output_bd = max over offsets_b <= t < offsets_b+1 with mask_t of values_td

    Of equal values the first one gets the whole gradient, as in `torch.max(dim)`. A NaN that counts
    is the maximum, as in PyTorch. A sequence without an event that counts gives 0 and no gradient.

    Args:
        values: [T, D], float64, float32, bfloat16 or float16. Or a nested tensor [B, *, D] of the
            layout torch.jagged, without `offsets`.
        offsets: [B + 1], int64 or int32, from 0 to T; sequence b is rows offsets[b] to
            offsets[b + 1].
        mask: bool [T], the events that count; None: all.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        [B, D] in the dtype of `values`: an element of it or 0, exact in every dtype. Equal
        arguments give equal bits.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong, or `offsets` do not rise from 0 to T. That
            is not looked at on a GPU and under torch.compile, where events behind the last offset
            belong to no sequence and have a gradient of 0.
        RuntimeError: `backend` cannot run.
    """
    if is_nested(values):
        (values,), offsets = jagged_parts(offsets, values=values)
    offsets = _check(values, offsets, mask)
    backend = resolve(backend, OP, values.device)
    if backend == "reference":
        return jagged_max_pool_ref(values, offsets, mask)
    return _JaggedMaxPool.apply(values, offsets, mask, backend)
