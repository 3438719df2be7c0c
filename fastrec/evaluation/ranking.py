"""Ranks of target items among candidates. Legend: N users, V items, D width, C candidates."""

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
    scores = torch.einsum("nd,ncd->nc", query, table[candidates]) + bias[candidates]
    target, others = scores[:, :1], scores[:, 1:]
    ranks = 1 + (others > target).sum(1).double() + (others == target).sum(1).double() / 2
    return torch.where(target.squeeze(1).isnan(), float(candidates.shape[1]), ranks)
