# SPDX-License-Identifier: Apache-2.0
"""The collectives of ops that take a `group`; imported only when one is given.

Legend: R ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup

# PyTorch 2.13 renamed them and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def process_group(group) -> Group:
    """The process group of `group`: itself, or that of a one-dimensional DeviceMesh."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a process group or a one-dimensional mesh, got a mesh of"
                f" {group.ndim} dimensions {group.mesh_dim_names or ''}"
            )
        group = group.get_group()
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group)}")
    return group


def gather(tensor: Tensor, group: Group) -> Tensor:
    """[R, *shape] of tensors of the same shape on all ranks."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    if out.numel():
        _all_gather(out.flatten(), tensor.contiguous().flatten(), group=group)
    return out


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, in place."""
    if tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def agree(names: Sequence[str], seen: Tensor) -> None:
    """Raise ValueError unless all rows of `seen` [R, len(names)] are equal. On a GPU, where the
    host must not wait, the failure is a device assertion."""
    same = (seen == seen[:1]).all(0)
    if seen.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(same.all(), f"ranks of the group differ in one of {list(names)}")
    elif not same.all():
        at = int((~same).nonzero()[0])
        raise ValueError(f"ranks of the group differ in {names[at]}: {seen[:, at].tolist()}")


def gather_padded(rows: Tensor, sizes: Sequence[int], group: Group, padding: float = 0) -> Tensor:
    """[R, most of sizes, ...]: rows [n, ...] of all ranks, `sizes[r]` of rank r, then `padding`."""
    longest = max(sizes)
    if len(rows) < longest:
        padded = rows.new_empty(longest, *rows.shape[1:])
        padded[: len(rows)], padded[len(rows) :] = rows, padding
        rows = padded
    return gather(rows, group)


class _GatherRows(torch.autograd.Function):
    """[sum of sizes, ...]: rows of all ranks end to end; the gradients of all ranks are added."""

    @staticmethod
    def forward(ctx, rows, sizes, dtype, group):
        ctx.sizes, ctx.dtype, ctx.group = sizes, rows.dtype, group
        blocks = gather_padded(rows, sizes, group)
        if min(sizes) == max(sizes):
            return blocks.flatten(0, 1).to(dtype)
        return torch.cat([block[:n] for block, n in zip(blocks, sizes, strict=True)]).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return _SumRows.apply(grad, ctx.sizes, ctx.dtype, ctx.group), None, None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_GatherRows`: the sum over the ranks of the rows of this one."""

    @staticmethod
    def forward(ctx, grad, sizes, dtype, group):
        ctx.sizes, ctx.dtype, ctx.group = sizes, grad.dtype, group
        longest = max(sizes)
        padded = grad.new_zeros(len(sizes), longest, *grad.shape[1:])
        for block, part in zip(padded, grad.split(sizes), strict=True):
            block[: len(part)] = part
        own = grad.new_empty(longest, *grad.shape[1:])
        if own.numel():
            _reduce_scatter(own.flatten(), padded.flatten(), group=group)
        return own[: sizes[dist.get_rank(group)]].to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return _GatherRows.apply(grad, ctx.sizes, ctx.dtype, ctx.group), None, None, None


def gather_rows(rows: Tensor, sizes: Sequence[int], group: Group, dtype=None) -> Tensor:
    """Rows [n, ...] of all ranks end to end, `sizes[r]` of rank r, as `dtype`. The gradient of a
    row is the sum of its gradients on all ranks, added in `dtype`."""
    return _GatherRows.apply(rows, list(sizes), dtype or rows.dtype, group)


class _SummedOver(torch.autograd.Function):
    """The sum over the ranks; each term gets the gradients of the sums of all ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return sum_over(tensor.clone(), group)

    @staticmethod
    def backward(ctx, grad):
        return _SummedOver.apply(grad, ctx.group), None


def summed_over(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, differentiable: the gradient of a term is the sum of those of the
    results on all ranks, which must all take part in backward."""
    return _SummedOver.apply(tensor, group)
