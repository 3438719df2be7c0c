"""Ranks of target items, in tiles. Legend: N users, V items, D width, C candidates."""

import torch
from torch import Tensor

TILE = 8192  # items per tile: N = 512 users x 8192 x 4 B = 16 MB of scores


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


def _score_tiles(query: Tensor, table: Tensor, bias: Tensor, exclude, tile: int):
    """(slice of items, scores [N, items of it]) over all items; -inf at the pairs of `exclude`."""
    for start in range(0, table.shape[0], tile):
        part = slice(start, min(start + tile, table.shape[0]))
        scores = torch.addmm(bias[part], query, table[part].T)
        if exclude is not None:
            rows, items = exclude
            inside = (items >= start) & (items < part.stop)
            scores[rows[inside], items[inside] - start] = float("-inf")
        yield part, scores


def rank_all(
    query: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    exclude: tuple[Tensor, Tensor] | None = None,
    tile: int = TILE,
) -> Tensor:
    """Rank of the target among all items: 1 + #greater + #equal with a smaller id, without [N, V].

    Args:
        query [N, D], table [V, D], bias [V], targets int64 [N].
        exclude: (rows, items), int64 pairs that are left out of the ranking, the target never.

    Returns:
        float64 [N]. A NaN score of the target ranks last.
    """
    items = table.shape[0]
    target_scores = torch.empty(len(query), 1, dtype=query.dtype, device=query.device)
    # The target's score comes from the same matrix product as the others: duplicated item vectors
    # must tie exactly.
    for part, scores in _score_tiles(query, table, bias, None, tile):
        here = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(1)
        target_scores[here, 0] = scores[here, targets[here] - part.start]
    ranks = torch.ones(len(query), dtype=torch.float64, device=query.device)
    ids = torch.arange(items, device=query.device)
    if exclude is not None:
        spared = exclude[1] == targets[exclude[0]]
        exclude = (exclude[0][~spared], exclude[1][~spared])
    for part, scores in _score_tiles(query, table, bias, exclude, tile):
        ahead = scores > target_scores
        ahead |= (scores == target_scores) & (ids[part] < targets[:, None])
        ranks += ahead.sum(1)
    return torch.where(target_scores.squeeze(1).isnan(), float(items), ranks)


def top_items(
    query: Tensor,
    table: Tensor,
    bias: Tensor,
    k: int,
    exclude: tuple[Tensor, Tensor] | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """The k best items of each row, best first, ties to the smaller id, without [N, V].

    Returns (scores [N, k], items int64 [N, k]); where fewer than k items remain after `exclude`,
    the rest has score -inf and item -1.
    """
    best_scores = query.new_full((len(query), 0), 0.0)
    best_items = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for part, scores in _score_tiles(query, table, bias, exclude, tile):
        ids = torch.arange(part.start, part.stop, device=query.device).expand(len(query), -1)
        scores, ids = torch.cat([best_scores, scores], 1), torch.cat([best_items, ids], 1)
        # A stable sort keeps the smaller id first among equals: columns are in id order per score.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_scores, best_items = scores.gather(1, order), ids.gather(1, order)
    missing = k - best_scores.shape[1]
    if missing > 0:
        best_scores = torch.nn.functional.pad(best_scores, (0, missing), value=float("-inf"))
        best_items = torch.nn.functional.pad(best_items, (0, missing), value=-1)
    return best_scores, best_items.masked_fill(best_scores == float("-inf"), -1)
