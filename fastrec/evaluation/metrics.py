"""Ranking metrics of one relevant item per user, from its rank (1 = first)."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def ranking_metrics(ranks: Tensor, cutoffs: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """HR@k, NDCG@k, MRR@k of the largest k and MRR, averaged over users, as fractions.

    HR@k = [r <= k] (= Recall@k), NDCG@k = [r <= k] / log2(r + 1), MRR@k = [r <= k] / r (= MAP@k),
    MRR = 1/r over all candidates (UPRec, section 4.2). HR@1 equals the others at 1, so only HR is
    reported for k = 1.

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
        hit = hit_of(ranks, k)
        metrics[f"HR@{k}"] = hit.mean().item()
        if k > 1:
            metrics[f"NDCG@{k}"] = (hit / torch.log2(ranks + 1)).mean().item()
    if (k := max(cutoffs)) > 1:
        metrics[f"MRR@{k}"] = (hit_of(ranks, k) / ranks).mean().item()
    metrics["MRR"] = ranks.reciprocal().mean().item()
    return metrics


def hit_of(ranks: Tensor, k: int) -> Tensor:
    """float64 [U]: 1 where a rank is among the first k."""
    return (ranks <= k).double()


def list_metrics(items: Tensor, counts: Tensor) -> dict[str, float]:
    """Of the lists that users are shown: `coverage`, the share of all items that is in some list,
    and `novelty`, the mean over listed items of -log2 of their share of the training events, in
    bits (Vargas and Castells, 2011).

    Args:
        items: int64 [U, k], -1 where a list is shorter.
        counts: int64 [V], training events of each item; one without any counts as one.
    """
    listed = items[items >= 0]
    share = counts.double().clamp_min(1)
    bits = -(share / share.sum()).log2()
    if len(listed) == 0:
        return {"coverage": 0.0, "novelty": 0.0}
    coverage = len(listed.unique()) / len(counts)
    return {"coverage": coverage, "novelty": bits[listed].mean().item()}


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
