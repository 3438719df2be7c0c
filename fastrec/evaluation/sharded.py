# SPDX-License-Identifier: Apache-2.0
"""Ranks among items whose vectors are spread over processes.

Legend: N targets of this process, M of all, R rows of this process, D width.
"""

import torch
from torch import Tensor

from fastrec.data.batch import offsets_of
from fastrec.nn.sharded import ShardedTable
from fastrec.ops.common.collectives import gather, gather_rows, sum_over

_ROWS = 1 << 14  # scored at a time

Jagged = tuple[Tensor, Tensor]  # items, offsets [N + 1]


def sharded_ranks(
    query: Tensor,
    target: Tensor,
    sharded: ShardedTable,
    adjustment: Tensor,
    left_out: Jagged | None = None,
    zero: Jagged | None = None,
) -> Tensor:
    """float64 [N]: ranks of the targets of this process among all items; equal scores are in the
    order of the items. Every process scores its own rows for the queries of all, and must ask.

    Args:
        query [N, D]; target: int64 [N]. adjustment: [V], what is taken from the scores.
        left_out, zero: the items of each row that have no rank, and whose score is 0.

    A target's own score is a product of its own, the others are matrix products: where two scores
    differ by rounding alone, one process may order them otherwise.
    """
    part, group = sharded.part, sharded.part.group
    own = sharded.rows(target, target[:0])
    score = (query * own.table[own.targets]).sum(1) + own.bias[own.targets] - adjustment[target]
    if zero is not None:
        score = torch.where(_holds(zero, target), 0, score)
    sizes = gather(torch.tensor([len(target)], device=query.device), group).flatten().tolist()
    query, score, target = (gather_rows(x, sizes, group) for x in (query, score, target))
    left_out, zero = (None if x is None else _of_all(x, group) for x in (left_out, zero))
    table, bias = sharded.table.weight, sharded.bias - adjustment[part.first : part.last]
    above = torch.zeros_like(target)
    for start in range(0, len(bias), _ROWS):
        rows = slice(start, min(start + _ROWS, len(bias)))
        scores = torch.addmm(bias[rows], query, table[rows].T)
        ids = torch.arange(part.first + rows.start, part.first + rows.stop, device=query.device)
        if zero is not None:
            scores[_inside(zero, ids)] = 0
        tied = (scores == score[:, None]) & (ids < target[:, None])
        higher = ((scores > score[:, None]) | tied) & (ids != target[:, None])
        if left_out is not None:
            higher[_inside(left_out, ids)] = False
        above += higher.sum(1)
    first = sum(sizes[: torch.distributed.get_rank(group)])
    return 1 + sum_over(above, group)[first : first + len(own.targets)].double()


def _owners(lists: Jagged) -> Tensor:
    items, offsets = lists
    return torch.arange(len(offsets) - 1, device=items.device).repeat_interleave(offsets.diff())


def _holds(lists: Jagged, target: Tensor) -> Tensor:
    """bool [N]: whether the target of a row is in its list."""
    owner = _owners(lists)
    found = torch.zeros(len(target), dtype=torch.bool, device=target.device)
    found[owner[lists[0] == target[owner]]] = True
    return found


def _inside(lists: Jagged, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of the listed items that are among consecutive `ids`."""
    column = lists[0] - ids[0]
    kept = (column >= 0) & (column < len(ids))
    return _owners(lists)[kept], column[kept]


def _of_all(lists: Jagged, group) -> Jagged:
    """The lists of all processes, one after another."""
    parts = []
    for values in (lists[0], lists[1].diff()):
        sizes = gather(torch.tensor([len(values)], device=values.device), group).flatten()
        parts.append(gather_rows(values, sizes.tolist(), group))
    return parts[0], offsets_of(parts[1])
