# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of each query against the candidates of its batch: public function and
reference.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.

Every similarity is a product after centring and scaling (`in_batch_pairs.operands`); what the
kernels compute of these products is in `in_batch_cross_entropy_autograd`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve
from fastrec.ops.common.arguments import (
    accumulate_dtype,
    autocast_dtype,
    ordered_sum,
    without_autocast,
)
from fastrec.ops.common.in_batch_cross_entropy_autograd import OP, InBatchCrossEntropy
from fastrec.ops.common.in_batch_pairs import (
    allowed_ref,
    as_columns,
    check_exclude,
    check_loss,
    check_pairs,
    check_positive,
    operands,
    promote_under_autocast,
    similarity_ref,
    transposed_lists,
)


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
    # Not logsumexp, whose gradient inherits the rounding of a large result.
    log_p = biased.masked_fill(~allowed, -math.inf).log_softmax(1)
    loss = -log_p.gather(1, positive[:, None]).squeeze(1)
    if symmetric:
        # The candidate of each query against all queries.
        turned = similarity_ref(candidate[positive], query, similarity, weight) / temperature
        masked = turned.masked_fill(~allowed[:, positive].T, -math.inf)
        loss = (loss - masked.log_softmax(1).diagonal()) / 2
    return _reduce(loss, reduction)


def directed_ref(query, candidate, candidate_bias, positive, rules, **options) -> Tensor:
    """`directed` by the reference, every query with a positive."""
    return in_batch_cross_entropy_ref(
        query,
        candidate,
        candidate_bias=candidate_bias,
        positive=positive,
        query_group=rules[0],
        candidate_group=rules[1],
        exclude=None if rules[2] is None else rules[2:],
        reduction="none",
        **options,
    )


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    # No query: the mean is 0 with a live graph, not NaN.
    return ordered_sum(loss) / (max(len(loss), 1) if reduction == "mean" else 1)


def directed(
    query: Tensor,
    candidate: Tensor,
    candidate_bias: Tensor | None,
    positive: Tensor,
    rules: tuple[Tensor | None, ...],
    *,
    similarity: str,
    weight: Tensor | None,
    temperature: float | Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Losses [B] of the queries against the candidates; 0 where `positive` is -1. `rules` are the
    exclusions, `dtype` is that of the products."""
    accumulate = accumulate_dtype(query)
    query, candidate = query.to(accumulate), candidate.to(accumulate)
    weight = None if weight is None else weight.to(accumulate)
    if similarity == "cosine":
        query, candidate = F.normalize(query, dim=1), F.normalize(candidate, dim=1)
    x, c, bias = operands(query, candidate, similarity, weight, temperature)
    if candidate_bias is not None:
        candidate_bias = candidate_bias.to(accumulate)
        bias = candidate_bias if bias is None else bias + candidate_bias
    if backend == "cpp":
        dtype = accumulate
    return InBatchCrossEntropy.apply(x, c, bias, positive, dtype, backend, *rules)


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
    group=None,
    candidates_per_rank: Sequence[int] | None = None,
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
        candidate: [C, D], same dtype; under autocast the wider of two counts.
        similarity: "dot", "cosine" or "weighted_l2".
        weight: [D], for "weighted_l2": any sign, trainable. None is 1 everywhere.
        temperature: a positive number, or a tensor without dimensions (then with a gradient).
        candidate_bias: [C], added after the temperature: -log Q corrects for the popularity of
            sampled candidates. -inf takes a candidate out (a positive then has an infinite loss).
        positive: [B], the candidate of each query. None: query i has candidate i.
        query_group, candidate_group: ids [B] and [C], or [B, G] and [C, G] for several
            columns. Equal ids in the same column exclude the pair; a negative id equals none.
        exclude: (values, offsets): the candidates values[offsets[i] : offsets[i + 1]], sorted, are
            left out for query i. [E] and [B + 1]. Positions and ids are int64, or int32, which is
            converted.
        symmetric: average with the loss of each positive candidate against all queries, with the
            same pairs left out. The positives must differ.
        reduction: "mean", "sum" or "none" ([B]).
        group: a torch.distributed process group (or one-dimensional DeviceMesh): the candidates of
            all its ranks, end to end in the order of rank, are the candidates of every query.
            `candidate`, `candidate_bias` and `candidate_group` are those of this rank, of any
            number; `positive` and `exclude` are positions among all candidates, and query i has
            the i-th candidate of this rank without `positive`. With `symmetric` the queries of
            all ranks, with their lists, answer; positives must differ on each rank.
        candidates_per_rank: the number of candidates of every rank. None: the ranks tell each
            other, for which the host waits for a GPU; `symmetric` does in any case.
        backend: None (native to the device), "reference", "cpp" or "triton".

    Returns:
        float32 (float64 for float64 input). Gradients have the dtype of their tensor. Embeddings
        are centred in float32 before anything is rounded or multiplied, so a common offset costs
        no precision. On a GPU float32 is multiplied as sums of two bfloat16, exact to 2^-15, on
        Hopper up to 128 columns and on Blackwell, from Triton 3.9 on, up to 64; by FMA elsewhere,
        and if `torch.backends.cuda.matmul.fp32_precision` is "ieee".

        With `group` the loss is that of the queries of this rank, "mean" over them alone. A
        candidate gets the sum of its gradients from the losses of all ranks, as does a query with
        `symmetric`; `weight` and `temperature` get that of this rank's loss. Where DDP averages
        over R ranks, the result is the gradient of the mean of the R losses: of the mean over all
        queries if ranks have equally many, else use "sum" and scale by R / number of all queries.

    Raises:
        ValueError, TypeError: a shape, dtype or option is wrong, or options differ between the
            ranks.
        IndexError: `positive` or a value of `exclude` is out of range (a device assertion on a
            GPU).
        RuntimeError: `backend` cannot run.
    """
    query, candidate = promote_under_autocast(query, candidate)
    query_group, candidate_group, exclude = check_pairs(
        query, candidate, similarity, weight, query_group, candidate_group, exclude
    )
    positive = check_loss(query, candidate, temperature, candidate_bias, positive, reduction)
    # With a group, `positive` and `exclude` count in candidates that are not here yet.
    if exclude is not None and group is None:
        check_exclude(exclude, len(query), len(candidate))
    if positive is not None and group is None:
        check_positive(positive, len(candidate), symmetric)
    if candidates_per_rank is not None and group is None:
        raise ValueError("candidates_per_rank belongs to a group, got none")
    backend = resolve(backend, OP, query.device)
    dtype, low = query.dtype, autocast_dtype(query.device)
    if low is not None and dtype == torch.float32:
        dtype = low  # of the products: centring comes first
    options: dict[str, Any] = {
        "similarity": similarity,
        "weight": weight,
        "temperature": temperature,
    }
    pairs: dict[str, Any] = {
        "candidate_bias": candidate_bias,
        "positive": positive,
        "query_group": query_group,
        "candidate_group": candidate_group,
        "exclude": exclude,
    }
    one_way: Callable[..., Tensor] = functools.partial(
        directed, **options, dtype=dtype, backend=backend
    )
    with without_autocast(query.device):
        if group is not None:
            from fastrec.ops.common.in_batch_group import losses_of_group

            if backend == "reference":
                one_way = functools.partial(directed_ref, **options)
            loss = losses_of_group(
                one_way, query, candidate, group, candidates_per_rank, symmetric, **pairs
            )
            return _reduce(loss, reduction)
        if backend == "reference":
            return in_batch_cross_entropy_ref(
                query, candidate, **options, **pairs, symmetric=symmetric, reduction=reduction
            )
        if query_group is not None and candidate_group is not None:
            query_group, candidate_group = as_columns(query_group), as_columns(candidate_group)
        rows = torch.arange(len(query), device=query.device)
        chosen = rows if positive is None else positive
        rules = (query_group, candidate_group, *(exclude or (None, None)))
        loss = one_way(query, candidate, candidate_bias, chosen, rules)
        if symmetric:
            # Candidates ask, queries answer; the bias of a candidate is the same for all of them.
            size = len(candidate)
            owner = rows.new_full((size,), -1).scatter(0, chosen, rows)
            lists = (None, None) if exclude is None else transposed_lists(exclude, size)
            rules = (candidate_group, query_group, *lists)
            turned = one_way(candidate, query, None, owner, rules)
            loss = (loss + turned.index_select(0, chosen)) / 2
    return _reduce(loss, reduction)
