# SPDX-License-Identifier: Apache-2.0
"""Ranking metrics of the relevant items of users, from their ranks (1 = first).

Legend: P pairs of a user and a relevant item, U users, T relevant items of a user.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def ranking_metrics(
    ranks: Tensor,
    cutoffs: tuple[int, ...] = (1, 5, 10),
    owner: Tensor | None = None,
    several: bool | None = None,
) -> dict[str, float]:
    """HR@k, NDCG@k, MRR@k of the largest k and MRR, averaged over users, as fractions.

    With one relevant item a user, of rank r: HR@k = [r <= k] (= Recall@k), NDCG@k = [r <= k] /
    log2(r + 1), MRR@k = [r <= k] / r (= MAP@k), MRR = 1/r over all candidates (UPRec, section 4.2).

    With T of them, in the order of their ranks r_1 .. r_T: HR@k = [r_1 <= k] and MRR = 1/r_1 (the
    best counts); Recall@k = hits / T; NDCG@k = sum of [r_i <= k] / log2(r_i + 1), over the same sum
    for the ranks 1 .. min(k, T); MAP@k of the largest k = sum of [r_i <= k] i / r_i, over min(k,
    T). Recall@k and MAP@k are reported where some user has several, or if `several` says so: of a
    part of the users, whose metrics stand beside those of all.

    HR@1 equals NDCG@1, so only HR is reported for k = 1.

    Args:
        ranks: [P], from 1; halves are allowed (ties shared).
        owner: int64 [P], whose item it is; None: everyone has one. Users without a pair are no
            part of the average.

    Raises:
        ValueError: no user, or a rank below 1 or NaN.
    """
    if ranks.numel() == 0:
        raise ValueError("no user to evaluate")
    ranks = ranks.double()
    if not bool((ranks >= 1).all()):
        raise ValueError("ranks must be numbers from 1 up")
    if owner is None or len(owner.unique()) == len(owner):
        owner = torch.arange(len(ranks), device=ranks.device)
        place = number = torch.ones_like(owner)
    else:
        ranks, owner, place, number = _by_user(ranks, owner)
    several = len(number) < len(ranks) if several is None else several

    def total(values: Tensor) -> Tensor:
        """[U]: the sums over the items of each user."""
        return torch.zeros_like(number, dtype=torch.float64).index_add(0, owner, values)

    best = place == 1
    metrics = {}
    for k in cutoffs:
        hit = hit_of(ranks, k)
        metrics[f"HR@{k}"] = hit[best].mean().item()
        if several:
            metrics[f"Recall@{k}"] = (total(hit) / number).mean().item()
        if k > 1:
            gain = total(hit / torch.log2(ranks + 1))
            metrics[f"NDCG@{k}"] = (gain / _ideal(number.clamp_max(k))).mean().item()
    if (k := max(cutoffs)) > 1:
        hit = hit_of(ranks, k)
        metrics[f"MRR@{k}"] = (hit / ranks)[best].mean().item()
        if several:
            precision = total(hit * place / ranks)
            metrics[f"MAP@{k}"] = (precision / number.clamp_max(k)).mean().item()
    metrics["MRR"] = ranks[best].reciprocal().mean().item()
    return metrics


def auc(scores: Tensor, labels: Tensor, owner: Tensor | None = None) -> Tensor:
    """Area under the ROC curve: the share of pairs of a click and another item in which the click
    has the larger score, equal ones a half.

    Args:
        scores: [P]. labels: int64 [P], 1 or 0.
        owner: int64 [P], from 0: one area for each user with both labels; None: one for all.

    Returns float64 [users with both labels].
    """
    owner = torch.zeros_like(labels) if owner is None else owner
    place = scores.unique(return_inverse=True)[1]
    key = owner * (len(scores) + 1) + place
    _, group, size = key.unique(return_inverse=True, return_counts=True)
    number = owner.bincount()
    before = number.cumsum(0) - number
    rank = size.cumsum(0)[group] - before[owner] - (size[group] - 1) / 2  # from 1, ties shared
    clicks = owner.bincount(weights=labels.double())
    total = owner.bincount(weights=rank.double() * labels)
    others = number - clicks
    both = (clicks > 0) & (others > 0)
    above = total - clicks * (clicks + 1) / 2
    return above[both] / (clicks * others)[both]


def _by_user(ranks: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ranks [P] user by user, the best first; whose each is, from 0; its place, from 1; T [U])."""
    order = ranks.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    number = owner.unique(return_counts=True)[1]
    owner = torch.arange(len(number), device=ranks.device).repeat_interleave(number)
    before = number.cumsum(0) - number
    place = torch.arange(1, len(ranks) + 1, device=ranks.device) - before[owner]
    return ranks[order], owner, place, number


def _ideal(number: Tensor) -> Tensor:
    """float64 [U]: the DCG of the ranks 1 .. number."""
    most = int(number.max())
    place = torch.arange(1, most + 1, dtype=torch.float64, device=number.device)
    return torch.log2(place + 1).reciprocal().cumsum(0)[number - 1]


def hit_of(ranks: Tensor, k: int) -> Tensor:
    """float64 [P]: 1 where a rank is among the first k."""
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
