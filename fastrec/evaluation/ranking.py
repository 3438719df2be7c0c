# SPDX-License-Identifier: Apache-2.0
"""Ranks of target items among candidates.

Legend: N rows (a target each), V items, D width, C candidates, U users, P targets of all users.
"""

import torch
from torch import Tensor


def rank_candidates(query: Tensor, table: Tensor, bias: Tensor, candidates: Tensor) -> Tensor:
    """Rank of the first candidate among all of them: 1 + #greater + #ties / 2.

    Args:
        query [N, D], table [V, D], bias [V].
        candidates: int64 [N, C], the target in column 0.

    Returns:
        float64 [N]. A NaN score of the target ranks last.
    """
    scores = candidate_scores(query, table, bias, candidates)
    target, others = scores[:, :1], scores[:, 1:]
    ranks = 1 + (others > target).sum(1).double() + (others == target).sum(1).double() / 2
    return torch.where(target.squeeze(1).isnan(), float(candidates.shape[1]), ranks)


def candidate_scores(query: Tensor, table: Tensor, bias: Tensor, candidates: Tensor) -> Tensor:
    """[N, C]: the scores of `candidates`, int64 [N, C]. Each is summed alike, so that equal items
    have equal scores: a batched product may sum the last candidates in another order."""
    return (table[candidates] * query.unsqueeze(1)).sum(2) + bias[candidates]


def others_above(ranks: Tensor, scores: Tensor, offsets: Tensor) -> Tensor:
    """float64 [P]: ranks among the other targets of the user as well, from `ranks` among negatives:
    each that is greater counts, and half of each that is equal. A NaN score ranks last.

    Args:
        scores: [P] of the targets.
        offsets: int64 [U + 1], the targets of each user, on the CPU.
    """
    number, before = offsets.diff().to(scores.device), offsets[:-1].to(scores.device)
    owner = torch.arange(len(number), device=scores.device).repeat_interleave(number)
    place = scores.unique(return_inverse=True)[1]  # from the smallest
    below = (place + 1).masked_fill(scores.isnan(), 0)
    key = (owner + 1) * (len(scores) + 1) - below
    _, group, size = key.unique(return_inverse=True, return_counts=True)
    # Users one after the other, the targets of each from its largest score.
    above = size.cumsum(0)[group] - before[owner] - (size[group] + 1) / 2
    return ranks + torch.where(scores.isnan(), number[owner] - 1.0, above.double())


def seen_above(
    ranks: Tensor,
    query: Tensor,
    table: Tensor,
    bias: Tensor,
    target: Tensor,
    items: Tensor,
    offsets: Tensor,
) -> Tensor:
    """float64 [N]: ranks among all items where those that a row has seen score 0, from `ranks`
    among the others. The target scores 0 as well where it was seen. Equal scores are in the order
    of the items.

    Args:
        query [N, D], table [V, D], bias [V].
        target: int64 [N].
        items, offsets: int64, the seen items of each row, sorted.
    """
    rows = torch.arange(len(target), device=items.device)
    owner = rows.repeat_interleave(offsets.diff(), output_size=len(items))
    first = torch.ones(len(items), dtype=torch.bool, device=items.device)
    first[1:] = (items[1:] != items[:-1]) | (owner[1:] != owner[:-1])
    own = items == target[owner]
    again = torch.zeros(len(target), dtype=torch.bool, device=items.device)
    again[owner[own]] = True
    score = (query * table[target]).sum(1) + bias[target]
    above = (score[owner] < 0) | ((score[owner] == 0) & (items < target[owner]))
    ranks = ranks.index_add(0, owner, (above & first & ~own).double())
    for row in again.nonzero().squeeze(1).tolist():  # the target is one of the zeros: rare
        scores = table @ query[row] + bias
        scores[items[offsets[row] : offsets[row + 1]]] = 0
        ahead = (scores > 0).sum() + (scores[: target[row]] == 0).sum()
        ranks[row] = 1 + ahead.double()
    return ranks
