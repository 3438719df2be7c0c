# SPDX-License-Identifier: Apache-2.0
"""The pairs of the in-batch ops: similarities, exclusions and the checks of their arguments.

Legend: B queries, C candidates, D width, G id columns, E listed exclusions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrec.ops.common.arguments import (
    accumulate_dtype,
    autocast_dtype,
    check_index,
    check_lists,
    check_number,
    check_offsets,
    check_range,
    check_reduction,
    check_tensor,
    check_width,
    require,
)
from fastrec.tensors import has_values

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
    shift = _centre(candidate)
    c = candidate - shift
    if similarity != "weighted_l2" and isinstance(temperature, float) and temperature == 1.0:
        return query, c, None
    scale = (query.new_ones(query.shape[1]) if weight is None else weight) / temperature
    if similarity != "weighted_l2":
        return query * scale, c, None
    return (query - shift) * (2 * scale), c, -(c.square() * scale).sum(1)


def _centre(candidate: Tensor) -> Tensor | float:
    """[D]: about the median of 31 candidates, evenly spread. A mean would follow one that is far
    away, or infinite, to where the differences of all others are lost."""
    rows = len(candidate)
    if rows == 0:
        return 0.0
    places = torch.arange(31, device=candidate.device) * rows // 31
    return candidate.detach().index_select(0, places).sort(0).values[14]  # NaN comes last


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
    shift = _centre(c)
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
    check_tensor("query", query)
    check_tensor("candidate", candidate, device=query.device)
    if query.dtype == candidate.dtype or autocast_dtype(query.device) is None:
        return query, candidate
    dtype = torch.promote_types(query.dtype, candidate.dtype)
    return query.to(dtype), candidate.to(dtype)


def check_pairs(query, candidate, similarity, weight, query_group, candidate_group, exclude):
    """What in_batch_cross_entropy and in_batch_hardest ask of their common arguments, but for the
    values of `exclude`. Returns the group ids and `exclude` as int64."""
    check_width("query", query, ("B", "D"))
    device, width = query.device, query.shape[1]
    check_tensor("candidate", candidate, ("C", width), (query.dtype,), device)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if weight is not None:
        if similarity != "weighted_l2":
            raise ValueError(f"weight belongs to similarity 'weighted_l2', got {similarity!r}")
        check_tensor("weight", weight, (width,), device=device)
    if (query_group is None) != (candidate_group is None):
        raise ValueError("query_group and candidate_group go together, one of them is None")
    if query_group is not None:
        columns = ("G",) if isinstance(query_group, Tensor) and query_group.dim() > 1 else ()
        query_group = check_index("query_group", query_group, (len(query), *columns), device)
        columns = query_group.shape[1:]
        candidate_group = check_index(
            "candidate_group", candidate_group, (len(candidate), *columns), device
        )
    exclude = int64_lists(exclude, device)
    return query_group, candidate_group, exclude


def check_loss(query, candidate, temperature, candidate_bias, positive, reduction):
    """What in_batch_cross_entropy asks besides; the range of `positive` is `check_positive`'s.
    Returns `positive` as int64."""
    rows, candidates = len(query), len(candidate)
    if isinstance(temperature, Tensor):
        on_host = temperature.device.type == "cpu"  # a number, also beside a GPU
        check_tensor("temperature", temperature, (), device=None if on_host else query.device)
        if has_values(temperature):  # a look at it on a GPU would cost as much as a small loss
            good = (temperature > 0) & temperature.isfinite()
            require(good, "temperature must be positive and finite")
    else:
        check_number("temperature", temperature)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if candidate_bias is not None:
        check_tensor("candidate_bias", candidate_bias, (candidates,), device=query.device)
    check_reduction(reduction)
    if positive is None:
        if candidates < rows:
            raise ValueError(
                f"{candidates} candidates for {rows} queries: pass `positive`, the candidate of"
                " each query"
            )
        return None
    return check_index("positive", positive, (rows,), query.device)


def check_positive(positive: Tensor, candidates: int, symmetric: bool) -> None:
    check_range("positive", positive, candidates)
    if symmetric:
        ordered = positive.sort().values
        require(
            (ordered.diff() > 0).all(),
            "symmetric needs a different positive for each query, got one twice",
        )


def int64_lists(exclude, device: torch.device) -> Lists | None:
    if exclude is None:
        return None
    if not isinstance(exclude, tuple | list) or len(exclude) != 2:
        raise TypeError("exclude must be a pair (values, offsets)")
    values, offsets = exclude
    return (
        check_index("exclude values", values, ("E",), device),
        check_index("exclude offsets", offsets, ("B + 1",), device),
    )


def check_exclude(exclude: Lists, queries: int, candidates: int) -> None:
    """The lists of `queries` rows, of positions below `candidates`."""
    values, offsets = exclude
    if len(offsets) != queries + 1:
        raise ValueError(f"exclude offsets must be [{queries + 1}], got [{len(offsets)}]")
    check_range("exclude values", values, candidates)
    check_offsets("exclude offsets", offsets, len(values), "E")
    rule = "must be sorted within each query"
    check_lists("exclude values", values, "exclude offsets", offsets, rule)
