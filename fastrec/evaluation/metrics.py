"""Ranking metrics of one relevant item per user, from its rank (1 = first)."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def ranking_metrics(ranks: Tensor, cutoffs: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """HR@k, NDCG@k and MRR, averaged over users, as fractions.

    HR@k = [r <= k] (= Recall@k), NDCG@k = [r <= k] / log2(r + 1), MRR = 1/r over all candidates
    (UPRec, section 4.2). HR@1 equals NDCG@1, so only HR is reported for k = 1.

    Args:
        ranks: [U], from 1; halves are allowed (ties shared).

    Raises:
        ValueError: no user, or a rank below 1 or NaN.
    """
    if ranks.numel() == 0:
        raise ValueError("no user to evaluate")
    ranks = ranks.double()
    if not bool((ranks >= 1).all()):
        raise ValueError("ranks must be numbers from 1 up")
    metrics = {}
    for k in cutoffs:
        hit = (ranks <= k).double()
        metrics[f"HR@{k}"] = hit.mean().item()
        if k > 1:
            metrics[f"NDCG@{k}"] = (hit / torch.log2(ranks + 1)).mean().item()
    metrics["MRR"] = ranks.reciprocal().mean().item()
    return metrics


def length_groups(
    lengths: np.ndarray, edges: tuple[int, ...] = (8, 15)
) -> list[tuple[str, np.ndarray]]:
    """(label, bool [U]) of the non-empty groups of users by sequence length, shortest first.

    The default edges give UPRec's groups (table 3): below 8, 8 to 14, 15 and more events.
    """
    group = np.searchsorted(edges, lengths, side="right")
    inner = [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    labels = [f"< {edges[0]}", *inner, f">= {edges[-1]}"]
    masks = [(label, group == index) for index, label in enumerate(labels)]
    return [(label, mask) for label, mask in masks if mask.any()]
