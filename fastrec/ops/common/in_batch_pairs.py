"""The pairs of the in-batch ops: similarities, exclusions and the checks of their arguments.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.ops.common.arguments import accumulate_dtype, check_range, require

SIMILARITIES = ("dot", "cosine", "weighted_l2")
Lists = tuple[Tensor, Tensor]


def operands(
    query: Tensor, candidate: Tensor, similarity: str, weight: Tensor | None, temperature
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x [B, D], c [C, D], bias [C] or None) such that the logit of a pair is x_i . c_j + bias_j,
    up to a constant of the query. Both sides are in the accumulation dtype.

    The candidates are centred: s = 2 q.(w c) - c.(w c) - q.(w q) does not change when q and c move
    together, and without it a common offset would cancel in the difference of large numbers. Moving
    c alone adds a constant to a row of q.c. The shift needs no gradient for the same reason.
    `temperature` stays on vectors [D]: the bits of a sum over [B, D] depend on the threads.
    """
    shift = candidate.detach().mean(0) if len(candidate) else 0.0
    c = candidate - shift
    if similarity != "weighted_l2" and isinstance(temperature, float) and temperature == 1.0:
        return query, c, None
    scale = (query.new_ones(query.shape[1]) if weight is None else weight) / temperature
    if similarity != "weighted_l2":
        return query * scale, c, None
    return (query - shift) * (2 * scale), c, -(c.square() * scale).sum(1)


def transposed_lists(exclude: Lists, candidates: int) -> Lists:
    """Candidates by query -> queries by candidate, sorted."""
    values, offsets = exclude
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(values))
    by_candidate, order = values.sort(stable=True)
    bounds = torch.arange(candidates + 1, device=values.device)
    return rows[order], torch.searchsorted(by_candidate, bounds)


def as_columns(ids: Tensor) -> Tensor:
    return ids[:, None] if ids.dim() == 1 else ids


def similarity_ref(query, candidate, similarity, weight):
    """[B, C] similarities in the accumulation dtype, up to a constant per query for "dot" and
    "cosine". Operands are centred before they are rounded to the dtype of the query, so that a
    mean far from zero costs no precision; the shift cancels in differences and in the softmax."""
    low, dtype = query.dtype, accumulate_dtype(query)
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
        rows, columns = as_columns(query_group), as_columns(candidate_group)
        for i in range(rows.shape[1]):
            allowed &= (rows[:, i, None] != columns[None, :, i]) | (rows[:, i, None] < 0)
    if exclude is not None:
        values, offsets = exclude
        owner = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        allowed = allowed.index_put((owner, values), allowed.new_zeros(()))
    if positive is not None:
        allowed = allowed.scatter(1, positive[:, None], True)
    return allowed


def promote_under_autocast(query: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast one side may come from a LayerNorm (float32) and the other from a projection:
    both in the wider dtype. What is multiplied is rounded later, after it is centred."""
    different = query.dtype != candidate.dtype and candidate.is_floating_point()
    if not different or not torch.is_autocast_enabled(query.device.type):
        return query, candidate
    dtype = torch.promote_types(query.dtype, candidate.dtype)
    return query.to(dtype), candidate.to(dtype)


def check_pairs(query, candidate, similarity, weight, query_group, candidate_group, exclude):
    """What in_batch_cross_entropy and in_batch_hardest ask of their common arguments."""
    if query.dim() != 2 or candidate.dim() != 2 or query.shape[1] != candidate.shape[1]:
        raise ValueError(
            "query must be [B, D] and candidate [C, D], got"
            f" {list(query.shape)} and {list(candidate.shape)}"
        )
    if query.shape[1] == 0:
        raise ValueError("query has no columns: D must be at least 1")
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
        check_exclude(exclude, len(query), len(candidate))


def check_loss(query, candidate, temperature, candidate_bias, positive, reduction):
    """What in_batch_cross_entropy asks besides; the range of `positive` is `check_positive`'s."""
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


def check_positive(positive: Tensor, candidates: int, symmetric: bool) -> None:
    check_range("positive", positive, candidates)
    if symmetric:
        ordered = positive.sort().values
        require(
            (ordered.diff() > 0).all(),
            "symmetric needs a different positive for each query, got one twice",
        )


def check_exclude(exclude, queries: int, candidates: int) -> None:
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
