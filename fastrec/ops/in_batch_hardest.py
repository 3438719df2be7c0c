# SPDX-License-Identifier: Apache-2.0
"""The most similar candidate of each query among those that are allowed.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.

The kernels only look for the position of the maximum. The similarity of the B pairs that are found
is computed from the embeddings, so its gradient reaches these pairs and nothing else.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import accumulate_dtype, without_autocast
from fastrec.ops.common.in_batch_pairs import (
    allowed_ref,
    as_columns,
    check_exclude,
    check_pairs,
    operands,
    promote_under_autocast,
    similarity_ref,
)
from fastrec.ops.common.native import kernels_of, register_cuda
from fastrec.ops.common.second_order import leaf, twice_differentiable

OP = "in_batch_hardest"

# Position [B] int64 of the maximum of query_i . candidate_j + bias_j, the lowest of equals; -1
# where query_group [B, G] with candidate_group [C, G] and the lists leave nothing.
torch.library.define(
    f"fastrec::{OP}_fwd",
    "(Tensor query, Tensor candidate, Tensor? bias, Tensor? query_group, Tensor? candidate_group,"
    " Tensor? exclude_values, Tensor? exclude_offsets) -> Tensor",
)
# [C, D]: sums of the rows of grad [B, D] whose index [B] is equal, in a fixed order; -1 is dropped.
torch.library.define(
    f"fastrec::{OP}_bwd", "(Tensor grad, Tensor index, SymInt candidates) -> Tensor"
)


class Hardest(NamedTuple):
    """Similarity [B] and position [B] of the most similar allowed candidate."""

    values: Tensor
    indices: Tensor


@torch.library.register_fake(f"fastrec::{OP}_fwd")
def _(query, candidate, bias, query_group, candidate_group, values, offsets):
    return query.new_empty(query.shape[0], dtype=torch.int64)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(grad, index, candidates):
    return grad.new_empty(candidates, grad.shape[1])


register_cuda(OP, "fwd", "bwd")


def _recompute(ctx, index):
    candidate = leaf(ctx.shape, index, ctx.dtype)
    return (candidate,), (candidate.index_select(0, index.clamp_min(0)),)


class _Select(torch.autograd.Function):
    """candidate[index], with a gradient that is summed in a fixed order. Row 0 for -1."""

    @staticmethod
    def forward(ctx, candidate, index, backend):
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype, ctx.backend = candidate.shape, candidate.dtype, backend
        return candidate.index_select(0, index.clamp_min(0))

    @staticmethod
    @twice_differentiable(_recompute)
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        bwd = kernels_of(OP, ctx.backend, grad.device).in_batch_hardest_bwd
        return bwd(grad.contiguous(), index, ctx.shape[0]), None, None


def _pair_similarity(query: Tensor, chosen: Tensor, similarity: str, weight: Tensor | None):
    if similarity != "weighted_l2":
        return (query * chosen).sum(1)
    square = (query - chosen).square()
    return -(square if weight is None else square * weight).sum(1)


def _normalized(similarity: str, *embeddings: Tensor):
    if similarity != "cosine":
        return embeddings
    return tuple(F.normalize(embedding, dim=1) for embedding in embeddings)


def in_batch_hardest_ref(
    query,
    candidate,
    *,
    similarity="dot",
    weight=None,
    query_group=None,
    candidate_group=None,
    exclude=None,
):
    """The oracle: plain PyTorch, any dtype, materialises the similarities."""
    dtype, shape = accumulate_dtype(query), (len(query), len(candidate))
    q, c = query.to(dtype), candidate.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    # In `dtype`: the position must not depend on the rounding of low-precision products.
    scores = similarity_ref(q, c, similarity, weight).detach()
    allowed = allowed_ref(shape, None, query_group, candidate_group, exclude, query.device)
    scores = scores.masked_fill(~allowed | scores.isnan(), -torch.inf)
    top, index = scores.max(1)
    index = index.masked_fill(top == -torch.inf, -1)
    q, c = _normalized(similarity, q, c)
    values = _pair_similarity(q, c[index.clamp_min(0)], similarity, weight)
    return Hardest(values.masked_fill(index < 0, -torch.inf), index)


def in_batch_hardest(
    query: Tensor,
    candidate: Tensor,
    *,
    similarity: str = "dot",
    weight: Tensor | None = None,
    query_group: Tensor | None = None,
    candidate_group: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Hardest:
    """Largest similarity of every query to an allowed candidate, and where it is; the B x C
    similarities never stored.

        values_i = max_j similarity(query_i, candidate_j),  indices_i = argmax    over the allowed j

    The hardest negative of AdaptSSR: group ids by user leave out a user's own views. Semantics of
    `torch.max(dim)`: of equal similarities the lowest index wins, and the gradient goes to the
    selected pairs only. A query without an allowed candidate has value -inf, index -1 and no
    gradient; nor has one with a NaN, and a candidate with a NaN is not selected.

    Args:
        query: [B, D], float64, float32, bfloat16 or float16.
        candidate: [C, D], C > 0, same dtype; under autocast the wider of two counts.
        similarity, weight, query_group, candidate_group, exclude: as in `in_batch_cross_entropy`.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        Hardest(values, indices), both [B]: float32 (float64 for float64 input) and int64.
        Similarities are compared in that dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong.
        IndexError: a value of `exclude` is out of range (a device assertion on a GPU).
        RuntimeError: `backend` cannot run.
    """
    query, candidate = promote_under_autocast(query, candidate)
    query_group, candidate_group, exclude = check_pairs(
        query, candidate, similarity, weight, query_group, candidate_group, exclude
    )
    if exclude is not None:
        check_exclude(exclude, len(query), len(candidate))
    if len(candidate) == 0:
        raise ValueError("candidate has no rows: there is nothing to choose from")
    backend = resolve(backend, OP, query.device)
    with without_autocast(query.device):
        if backend == "reference":
            return in_batch_hardest_ref(
                query,
                candidate,
                similarity=similarity,
                weight=weight,
                query_group=query_group,
                candidate_group=candidate_group,
                exclude=exclude,
            )
        dtype = accumulate_dtype(query)
        q, c = _normalized(similarity, query.to(dtype), candidate.to(dtype))
        weight = None if weight is None else weight.to(dtype)
        if query_group is not None and candidate_group is not None:
            query_group, candidate_group = as_columns(query_group), as_columns(candidate_group)
        fwd = kernels_of(OP, backend, query.device).in_batch_hardest_fwd
        with torch.no_grad():
            pairs = operands(q, c, similarity, weight, 1.0)
            index = fwd(*pairs, query_group, candidate_group, *(exclude or (None, None)))
        values = _pair_similarity(q, _Select.apply(c, index, backend), similarity, weight)
        return Hardest(values.masked_fill(index < 0, -torch.inf), index)
