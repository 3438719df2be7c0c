# SPDX-License-Identifier: Apache-2.0
"""`in_batch_cross_entropy` with the candidates of all ranks of a process group.

Legend: B queries, C candidates and E listed exclusions of this rank, D width, R ranks.

Candidates are gathered: each rank computes B x (C of all ranks) logits. On the way back the
gradients of a candidate are added over the ranks. Nothing else of the loss is communicated.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastrec.ops.common.arguments import FLOATS, accumulate_dtype
from fastrec.ops.common.collectives import Group, agree, gather, gather_rows, process_group
from fastrec.ops.common.in_batch_pairs import (
    Lists,
    as_columns,
    check_exclude,
    check_positive,
    transposed_lists,
)


def _exchange(own: dict[str, int], facts: dict[str, int], like: Tensor, group: Group):
    """Sizes of all ranks by name; `facts` must be the same on all ranks."""
    numbers = torch.tensor([*own.values(), *facts.values()], device=like.device)
    seen = gather(numbers, group).cpu()
    agree(list(facts), seen[:, len(own) :])
    return {name: seen[:, i].tolist() for i, name in enumerate(own)}


def _listed(lists: Lists, rows: Tensor) -> Lists:
    """The lists of some rows."""
    values, offsets = lists
    lengths = offsets.diff()[rows]
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(offsets[rows] - ends + lengths, lengths)
    return values[shift + torch.arange(len(shift), device=shift.device)], F.pad(ends, (1, 0))


def losses_of_group(
    one_way: Callable[..., Tensor],
    query: Tensor,
    candidate: Tensor,
    group,
    candidates_per_rank: Sequence[int] | None,
    symmetric: bool,
    *,
    candidate_bias: Tensor | None,
    positive: Tensor | None,
    exclude: Lists | None,
    query_group: Tensor | None,
    candidate_group: Tensor | None,
) -> Tensor:
    """Losses [B] of this rank's queries. `one_way` is `directed` with its options, and the
    arguments are those of `in_batch_cross_entropy`."""
    group = process_group(group)
    rank, world, wide = dist.get_rank(group), dist.get_world_size(group), accumulate_dtype(query)
    columns = 0 if query_group is None else as_columns(query_group).shape[1]
    if candidates_per_rank is None or symmetric:
        learns = torch.is_grad_enabled()
        facts = {
            "the width": query.shape[1],
            "the dtype of query": FLOATS.index(query.dtype),
            "having a candidate_bias": candidate_bias is not None,
            "the columns of query_group": columns,
            "having exclude": exclude is not None,
            "symmetric": symmetric,
            "whether candidate needs a gradient": learns and candidate.requires_grad,
            "whether candidate_bias needs a gradient": learns
            and candidate_bias is not None
            and candidate_bias.requires_grad,
            "whether query needs a gradient, with symmetric": symmetric
            and learns
            and query.requires_grad,
        }
        own = {"queries": len(query), "candidates": len(candidate)}
        own["listed"] = 0 if exclude is None else len(exclude[0])
        sizes = _exchange(own, facts, query, group)
        if candidates_per_rank is not None and list(candidates_per_rank) != sizes["candidates"]:
            raise ValueError(
                f"candidates_per_rank is {list(candidates_per_rank)}, the ranks have"
                f" {sizes['candidates']}"
            )
    else:
        sizes = {"candidates": list(candidates_per_rank)}
        if len(candidates_per_rank) != world or candidates_per_rank[rank] != len(candidate):
            raise ValueError(
                f"candidates_per_rank must be of {world} ranks with {len(candidate)} on rank"
                f" {rank}, got {list(candidates_per_rank)}"
            )
    counts = sizes["candidates"]
    first = [0, *accumulate(counts)]
    own_rows = torch.arange(len(query), device=query.device)
    chosen = own_rows + first[rank] if positive is None else positive
    if positive is not None:
        check_positive(positive, first[-1], symmetric)
    if exclude is not None:
        check_exclude(exclude, len(query), first[-1])

    candidate = gather_rows(candidate, counts, group, wide)
    if candidate_bias is not None:
        candidate_bias = gather_rows(candidate_bias, counts, group, wide)
    if query_group is not None and candidate_group is not None:
        query_group, candidate_group = as_columns(query_group), as_columns(candidate_group)
        candidate_group = gather_rows(candidate_group, counts, group)
    rules = (query_group, candidate_group, *(exclude or (None, None)))
    loss = one_way(query, candidate, candidate_bias, chosen, rules)
    if not symmetric:
        return loss

    # The candidate of each query asks, the queries of all ranks answer.
    counts = sizes["queries"]
    queries, start = gather_rows(query, counts, group, wide), sum(counts[:rank])
    if query_group is not None and candidate_group is not None:
        rules = (candidate_group[chosen], gather_rows(query_group, counts, group), None, None)
    if exclude is not None:
        values, offsets = exclude
        values = gather_rows(values, sizes["listed"], group)
        lengths = gather_rows(offsets.diff(), counts, group)
        every = transposed_lists((values, F.pad(lengths.cumsum(0), (1, 0))), first[-1])
        rules = (*rules[:2], *_listed(every, chosen))
    asking = candidate.index_select(0, chosen)
    return (loss + one_way(asking, queries, None, own_rows + start, rules)) / 2
