"""Softmax cross-entropy of each query against the candidates of its batch.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.

Every similarity is a product after centring and scaling (`in_batch_pairs.operands`), so the kernels
know one function of the logits s_ij = x_i . c_j + b_j, its positive t_i and the pairs left out:

    loss_i = log(1 + sum_{j != t} exp(s_ij - s_it)),  p_ij = exp(s_ij - s_it - loss_i)
    dx_i = g_i (sum_{j != t} p_ij c_j - (1 - p_it) c_t)
    G_ij = g_i (p_ij - [j = t_i]),  dc_j = sum_i G_ij x_i,  db_j = sum_i G_ij

The positive stays out of the sum: where all other candidates are left out, loss and gradients are
exactly 0. The forward kernel returns dx_i / g_i, so that it needs no second sweep.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrec.backend import resolve
from fastrec.ops.in_batch_pairs import (
    accumulate_dtype,
    allowed_ref,
    as_columns,
    check_pairs,
    check_range,
    operands,
    require,
    similarity_ref,
    transposed_lists,
)

OP = "in_batch_cross_entropy"

# A logit is query_i . candidate_j + bias_j. positive [B], -1 = row not scored: loss 0, no gradient.
# query_group [B, G] with candidate_group [C, G] and exclude_values [E] with exclude_offsets [B + 1]
# leave pairs out. loss, lse [B] and direction [B, D] (the gradient of the loss with respect to the
# query, [0, D] if not asked for) are float32, or float64 with the query.
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
    return loss, torch.empty_like(loss), loss.new_empty(rows if with_direction else 0, width)


@torch.library.register_fake(f"fastrec::{OP}_bwd")
def _(query, candidate, bias, positive, qg, cg, values, offsets, loss, lse, grad_loss):
    grad_bias = loss.new_empty(0 if bias is None else candidate.shape[0])
    return loss.new_empty(candidate.shape), grad_bias


@torch.library.impl(f"fastrec::{OP}_fwd", "CUDA")
def _(*args):
    from fastrec.kernels import in_batch_cross_entropy as kernels

    return kernels.in_batch_cross_entropy_fwd(*args)


@torch.library.impl(f"fastrec::{OP}_bwd", "CUDA")
def _(*args):
    from fastrec.kernels import in_batch_cross_entropy as kernels

    return kernels.in_batch_cross_entropy_bwd(*args)


def _launchers(backend: str, device: torch.device):
    if backend == "triton" and device.type != "cuda":  # the interpreter, see backend.interpreting
        from fastrec.kernels import in_batch_cross_entropy as kernels

        return kernels.in_batch_cross_entropy_fwd, kernels.in_batch_cross_entropy_bwd
    ops = torch.ops.fastrec
    return ops.in_batch_cross_entropy_fwd, ops.in_batch_cross_entropy_bwd


class _InBatchCrossEntropy(torch.autograd.Function):
    """Loss [B] of logits query_i . candidate_j + bias_j; `rules` are the exclusions."""

    @staticmethod
    def forward(ctx, query, candidate, bias, positive, dtype, backend, *rules):
        fwd, _ = _launchers(backend, query.device)
        pairs = (query.to(dtype), candidate.to(dtype), bias, positive, *rules)
        loss, lse, direction = fwd(*pairs, ctx.needs_input_grad[0])
        ctx.save_for_backward(*pairs, loss, lse, direction)
        ctx.backend = backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        *pairs, loss, lse, direction = ctx.saved_tensors
        grad_query = grad_candidate = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_query = direction * grad_loss[:, None]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            _, bwd = _launchers(ctx.backend, grad_loss.device)
            grad_candidate, grad_bias = bwd(*pairs, loss, lse, grad_loss.contiguous())
            grad_bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_query, grad_candidate, grad_bias, *[None] * 7


def in_batch_cross_entropy_ref(
    query,
    candidate,
    *,
    similarity="dot",
    weight=None,
    temperature=1.0,
    candidate_bias=None,
    positive=None,
    query_group=None,
    candidate_group=None,
    exclude=None,
    symmetric=False,
    reduction="mean",
):
    """The oracle: plain PyTorch, any dtype, materialises the logits."""
    shape = len(query), len(candidate)
    if positive is None:
        positive = torch.arange(len(query), device=query.device)
    logits = similarity_ref(query, candidate, similarity, weight) / temperature
    allowed = allowed_ref(shape, positive, query_group, candidate_group, exclude, query.device)
    biased = logits if candidate_bias is None else logits + candidate_bias.to(logits.dtype)
    target = biased.gather(1, positive[:, None]).squeeze(1)
    loss = biased.masked_fill(~allowed, -math.inf).logsumexp(1) - target
    if symmetric:
        # The candidate of each query against all queries.
        turned = similarity_ref(candidate[positive], query, similarity, weight) / temperature
        masked = turned.masked_fill(~allowed[:, positive].T, -math.inf)
        loss = loss + masked.logsumexp(1) - turned.diagonal()
        loss = loss / 2
    return _reduce(loss, reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    # No query: the mean is 0 with a live graph, not NaN.
    return loss.sum() / (max(len(loss), 1) if reduction == "mean" else 1)


def _check(query, candidate, temperature, candidate_bias, positive, symmetric, reduction):
    rows, candidates = len(query), len(candidate)
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                "temperature must be a number or a floating point tensor without dimensions, got"
                f" {temperature.dtype} {list(temperature.shape)}"
            )
    elif not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if candidate_bias is not None:
        if candidate_bias.shape != (candidates,):
            raise ValueError(
                f"candidate_bias must be [{candidates}], got {list(candidate_bias.shape)}"
            )
        if not candidate_bias.is_floating_point():
            raise TypeError(
                f"candidate_bias must be a floating point tensor, got {candidate_bias.dtype}"
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if positive is None:
        if candidates < rows:
            raise ValueError(
                f"{candidates} candidates for {rows} queries: pass `positive`, the candidate of"
                " each query"
            )
        return
    if positive.dtype != torch.int64:
        raise TypeError(f"positive must be int64 candidate positions, got {positive.dtype}")
    if positive.shape != (rows,):
        raise ValueError(f"positive must be [{rows}], got {list(positive.shape)}")
    check_range("positive", positive, candidates)
    if symmetric:
        ordered = positive.sort().values
        require(
            (ordered.diff() > 0).all(),
            "symmetric needs a different positive for each query, got one twice",
        )


def in_batch_cross_entropy(
    query: Tensor,
    candidate: Tensor,
    *,
    similarity: str = "dot",
    weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    candidate_bias: Tensor | None = None,
    positive: Tensor | None = None,
    query_group: Tensor | None = None,
    candidate_group: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of every query's positive among all candidates; the B x C logits never stored.

        logit_ij = similarity(query_i, candidate_j) / temperature + candidate_bias_j
        loss_i   = log sum_j exp(logit_ij) - logit_i,positive_i    over the j that are allowed for i

    Similarities: "dot" q.c, "cosine" q.c / (|q| |c|), "weighted_l2" -(sum_d weight_d (q_d - c_d)^2
    + b), the one of UPRec (eq. 13-14). b adds the same to all logits of a query: it has no
    influence and a gradient of exactly 0, so it is not an argument.

    The positive of a query is always allowed. Another candidate is left out, in the loss and in
    every gradient, if it shares an id with the query in any column of the groups, or is listed in
    `exclude`. A query whose negatives are all left out has loss 0 and gradient 0 and counts in the
    mean.

    Args:
        query: [B, D], float64, float32, bfloat16 or float16.
        candidate: [C, D], same dtype.
        similarity: "dot", "cosine" or "weighted_l2".
        weight: [D], for "weighted_l2": any sign, trainable. None is 1 everywhere.
        temperature: a positive number, or a tensor without dimensions (then with a gradient).
        candidate_bias: [C], added after the temperature: -log Q corrects for the popularity of
            sampled candidates. -inf takes a candidate out (a positive then has an infinite loss).
        positive: int64 [B], the candidate of each query. None: query i has candidate i.
        query_group, candidate_group: int64 ids [B] and [C], or [B, G] and [C, G] for several
            columns. Equal ids in the same column exclude the pair; a negative id equals none.
        exclude: (values, offsets): the candidates values[offsets[i] : offsets[i + 1]], sorted, are
            left out for query i. int64, [E] and [B + 1].
        symmetric: average with the loss of each positive candidate against all queries, with the
            same pairs left out. The positives must differ.
        reduction: "mean", "sum" or "none" ([B]).
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        float32 (float64 for float64 input). Gradients have the dtype of their tensor. Embeddings
        are centred in float32 before anything is rounded or multiplied, so a common offset costs
        no precision. Not twice differentiable, except on the reference backend.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong. IndexError: `positive` or a value
        of `exclude` is out of range (a device assertion on a GPU). RuntimeError: `backend` cannot
        run.
    """
    check_pairs(query, candidate, similarity, weight, query_group, candidate_group, exclude)
    _check(query, candidate, temperature, candidate_bias, positive, symmetric, reduction)
    backend = resolve(backend, OP, query.device)
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device)  # of the products: centring comes first
    with torch.autocast(device, enabled=False):
        if backend == "reference":
            return in_batch_cross_entropy_ref(
                query,
                candidate,
                similarity=similarity,
                weight=weight,
                temperature=temperature,
                candidate_bias=candidate_bias,
                positive=positive,
                query_group=query_group,
                candidate_group=candidate_group,
                exclude=exclude,
                symmetric=symmetric,
                reduction=reduction,
            )
        accumulate = accumulate_dtype(query)
        query, candidate = query.to(accumulate), candidate.to(accumulate)
        weight = None if weight is None else weight.to(accumulate)
        if similarity == "cosine":
            query, candidate = F.normalize(query, dim=1), F.normalize(candidate, dim=1)
        if query_group is not None and candidate_group is not None:
            query_group, candidate_group = as_columns(query_group), as_columns(candidate_group)
        if backend == "cpp":
            dtype = accumulate
        count, size = len(query), len(candidate)

        x, c, bias = operands(query, candidate, similarity, weight, temperature)
        if candidate_bias is not None:
            candidate_bias = candidate_bias.to(accumulate)
            bias = candidate_bias if bias is None else bias + candidate_bias
        rows = torch.arange(count, device=query.device)
        chosen = rows if positive is None else positive
        rules = (query_group, candidate_group, *(exclude or (None, None)))
        loss = _InBatchCrossEntropy.apply(x, c, bias, chosen, dtype, backend, *rules)
        if symmetric:
            # Candidates ask, queries answer; the bias of a candidate is the same for all of them.
            x, c, bias = operands(candidate, query, similarity, weight, temperature)
            owner = rows.new_full((size,), -1).scatter(0, chosen, rows)
            lists = (None, None) if exclude is None else transposed_lists(exclude, size)
            turned = _InBatchCrossEntropy.apply(
                x, c, bias, owner, dtype, backend, candidate_group, query_group, *lists
            )
            loss = (loss + turned.index_select(0, chosen)) / 2
    return _reduce(loss, reduction)
