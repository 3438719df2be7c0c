"""Softmax cross-entropy of each query against the candidates of its batch.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.backend import resolve

OP = "in_batch_cross_entropy"
SIMILARITIES = ("dot", "cosine", "weighted_l2")


def _accumulate_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _as_columns(ids: Tensor) -> Tensor:
    return ids if ids.dim() == 2 else ids[:, None]


def similarity_ref(query, candidate, similarity, weight):
    """[B, C] similarities in the accumulation dtype, up to a constant per query for "dot" and
    "cosine". Operands are centred before they are rounded to the dtype of the query, so that a
    mean far from zero costs no precision; the shift cancels in differences and in the softmax."""
    low, dtype = query.dtype, _accumulate_dtype(query)
    q, c = query.to(dtype), candidate.to(dtype)
    if similarity == "cosine":
        q, c = F.normalize(q, dim=1), F.normalize(c, dim=1)
    shift = c.detach().mean(0) if len(c) else 0
    c = (c - shift).to(low).to(dtype)
    if similarity != "weighted_l2":
        return q.to(low).to(dtype) @ c.T
    w = torch.ones_like(c[:1]) if weight is None else weight.to(dtype)[None]
    q = q - shift
    square = (w * q.square()).sum(1)[:, None] + (w * c.square()).sum(1)[None]
    return (2 * w * q).to(low).to(dtype) @ c.T - square


def allowed_ref(shape, positive, query_group, candidate_group, exclude, device):
    """[B, C] bool: the positive, and every candidate that no rule excludes."""
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    if query_group is not None:
        rows, columns = _as_columns(query_group), _as_columns(candidate_group)
        for i in range(rows.shape[1]):
            allowed &= (rows[:, i, None] != columns[None, :, i]) | (rows[:, i, None] < 0)
    if exclude is not None:
        values, offsets = exclude
        owner = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        allowed = allowed.index_put((owner, values), allowed.new_zeros(()))
    if positive is not None:
        allowed = allowed.scatter(1, positive[:, None], True)
    return allowed


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
        turned, allowed = logits[:, positive].T, allowed[:, positive].T
        loss = loss + turned.masked_fill(~allowed, -math.inf).logsumexp(1) - turned.diagonal()
        loss = loss / 2
    return _reduce(loss, reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    # No query: the mean is 0 with a live graph, not NaN.
    return loss.sum() / (max(len(loss), 1) if reduction == "mean" else 1)


def check_pairs(query, candidate, similarity, weight, query_group, candidate_group, exclude):
    """What in_batch_cross_entropy and in_batch_hardest ask of their common arguments."""
    if query.dim() != 2 or candidate.dim() != 2 or query.shape[1] != candidate.shape[1]:
        raise ValueError(
            "query must be [B, D] and candidate [C, D], got"
            f" {list(query.shape)} and {list(candidate.shape)}"
        )
    if not query.is_floating_point():
        raise TypeError(f"query must be a floating point tensor, got {query.dtype}")
    if candidate.dtype != query.dtype:
        raise TypeError(f"candidate must be {query.dtype} like query, got {candidate.dtype}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if weight is not None:
        if similarity != "weighted_l2":
            raise ValueError(f"weight belongs to similarity 'weighted_l2', got {similarity!r}")
        if weight.shape != (query.shape[1],):
            raise ValueError(f"weight must be [{query.shape[1]}], got {list(weight.shape)}")
        if not weight.is_floating_point():
            raise TypeError(f"weight must be a floating point tensor, got {weight.dtype}")
    if (query_group is None) != (candidate_group is None):
        raise ValueError("query_group and candidate_group go together, one of them is None")
    if query_group is not None:
        columns = query_group.shape[1:]
        for name, ids, rows in (
            ("query_group", query_group, len(query)),
            ("candidate_group", candidate_group, len(candidate)),
        ):
            if ids.dtype != torch.int64:
                raise TypeError(f"{name} must be int64 ids, got {ids.dtype}")
            if ids.dim() not in (1, 2) or len(ids) != rows or ids.shape[1:] != columns:
                expected = [rows, *columns] if ids.dim() < 3 and len(columns) < 2 else [rows, "G"]
                raise ValueError(f"{name} must be {expected}, got {list(ids.shape)}")
    if exclude is not None:
        _check_exclude(exclude, len(query), len(candidate))


def _check_exclude(exclude, queries: int, candidates: int) -> None:
    if not isinstance(exclude, tuple | list) or len(exclude) != 2:
        raise TypeError("exclude must be a pair (values, offsets)")
    values, offsets = exclude
    for name, tensor in (("values", values), ("offsets", offsets)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise TypeError(
                f"exclude {name} must be int64 and one-dimensional, got {tensor.dtype}"
                f" {list(tensor.shape)}"
            )
    if len(offsets) != queries + 1:
        raise ValueError(f"exclude offsets must be [{queries + 1}], got [{len(offsets)}]")
    check_range("exclude values", values, candidates)
    ordered = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == len(values))
    require(ordered, f"exclude offsets must rise from 0 to {len(values)}, the number of values")
    starts = torch.zeros(len(values) + 1, dtype=torch.bool, device=values.device)
    # A wrong offset was refused above (on a GPU: is about to be).
    starts = starts.index_fill(0, offsets.clamp(0, len(values)), True)
    rises = (values.diff() >= 0) | starts[1 : len(values)]
    require(rises.all(), "exclude values must be sorted within each query")


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless `condition`. No host synchronisation on a GPU: there, as in PyTorch's
    own losses, the failure is a device assertion."""
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def check_range(name: str, index: Tensor, size: int) -> None:
    wrong = (index < 0) | (index >= size)
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), f"{name} outside [0, {size})")
    elif wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(f"{name}[{at}] is {int(index[at])}, expected a value in [0, {size})")


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
            sampled candidates. -inf takes a candidate out; not allowed for a positive.
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
    with torch.autocast(query.device.type, enabled=False):
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
