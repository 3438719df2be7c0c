# SPDX-License-Identifier: Apache-2.0
"""The item that is most like each item, by the users who have both: what `substitute` and `insert`
put into a sequence.

Legend: V items, N pairs of a user and an item, S pairs of items of the same user.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrec.data.batch import np_spans

MOST = 200  # items of a user that count, the latest: at most 200 x 199 pairs a user
_BLOCK = 1 << 22  # of S at a time


class Nearest(NamedTuple):
    """items: int64 [V], -1 for none. scores: float32 [V], their correlation, -inf for none. lowest:
    float32, the smallest of all pairs of different items that some user has both of."""

    items: Tensor
    scores: Tensor
    lowest: Tensor


def most_similar(dataset, split: str = "train", users=None) -> Tensor:
    """int64 [V]: the items of `nearest`."""
    return nearest(dataset, split, users).items


def nearest(dataset, split: str = "train", users=None) -> Nearest:
    """The item j with the largest

        Cor(i, j) = sum over users u of both of 1 / log(1 + |N(u)|) / sqrt(|N(i)| |N(j)|)

    for each item i, the smaller id of equal ones (to float32), none where no user has another item
    beside i: the memory-based correlation of CoSeRec (Liu et al., 2021). N(u) are the distinct
    items among the last 200 events of a user in the inputs of `split`, N(i) the users that have i
    among theirs.

    users: int64, who counts; default all. Time is O(S log S), S = sum over users of |N(u)|^2,
    memory O(N) and a block of S: nothing has a row and a column for every item.
    """
    user, item = _pairs(dataset, split, users)
    size = np.bincount(user, minlength=dataset.num_users)  # |N(u)|
    weight = np.zeros(len(size))
    weight[size > 1] = 1 / np.log1p(size[size > 1])
    begin = np.concatenate(([0], size.cumsum()))  # of the items of each user
    owner = user[item.argsort(kind="stable")]  # the users of item 0, those of item 1, ..
    popularity = np.bincount(item, minlength=dataset.num_items)  # |N(i)|
    first = np.concatenate(([0], popularity.cumsum()))
    found = np.full(dataset.num_items, -1, dtype=np.int64)
    scores = np.full(dataset.num_items, -np.inf, dtype=np.float32)
    lowest = np.float32(np.inf)
    # Items are taken in runs whose users have about a block of items together.
    work = np.concatenate(([0], size[owner].cumsum()))[first]  # items beside those before each item
    cuts = np.searchsorted(work, np.arange(_BLOCK, work[-1], _BLOCK))
    for low, high in pairwise((0, *np.unique(cuts), dataset.num_items)):
        one = np.repeat(np.arange(low, high), popularity[low:high])
        other = owner[first[low] : first[high]]
        key, score = np.empty(0, np.int64), np.empty(0)
        # An item that many users have fills several blocks.
        for part in np.array_split(np.arange(len(one)), 1 + (work[high] - work[low]) // _BLOCK):
            who = other[part]
            left = np.repeat(one[part], size[who])
            right = item[np_spans(begin[who], size[who])]
            apart = left != right
            pairs = (left * dataset.num_items + right)[apart]
            gains = np.repeat(weight[who], size[who])[apart]
            key, score = _summed(np.append(key, pairs), np.append(score, gains))
        left, right = np.divmod(key, dataset.num_items)
        score = (score / np.sqrt(popularity[left] * popularity[right])).astype(np.float32)
        best = np.lexsort((right, -score, left))
        best = best[np.diff(left[best], prepend=-1) > 0]  # the first of each item
        found[left[best]], scores[left[best]] = right[best], score[best]
        lowest = min(lowest, score.min(initial=np.inf))
    least = torch.tensor(lowest, device="cpu")
    return Nearest(torch.from_numpy(found), torch.from_numpy(scores), least)


def _summed(key: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, ascending, and the sum of the gains of each."""
    if len(key) == 0:
        return key, gain
    order = key.argsort(kind="stable")
    start = np.flatnonzero(np.diff(key[order], prepend=-1))
    return key[order][start], np.add.reduceat(gain[order], start)


def _pairs(dataset, split: str, users) -> tuple[np.ndarray, np.ndarray]:
    """(user, item) int64 [N], ascending and distinct."""
    kept = dataset.split_lengths(split)
    if users is not None:
        inside = np.zeros(dataset.num_users, dtype=bool)
        inside[np.asarray(users)] = True
        kept = np.where(inside, kept, 0)
    count = np.minimum(kept, MOST)
    items = dataset.values[np_spans(dataset.offsets[:-1] + kept - count, count)]
    key = np.repeat(np.arange(dataset.num_users) * dataset.num_items, count) + items
    user, item = np.divmod(np.unique(key), dataset.num_items)
    return user, item
