# SPDX-License-Identifier: Apache-2.0
"""The k-core of the interactions. Letters: E events."""

import numpy as np

_PASSES = 20


def k_core_mask(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """bool [E]: the events of the k-core, where every user and every item has k events or more.

    user, item: int64 [E], ids from 0. Events count, repeated (user, item) pairs too. The k-core is
    unique: users and items below k are removed until none is left. Time O(E).
    """
    kept = np.arange(len(user))
    for _ in range(_PASSES):  # most data is done after a few; a chain loses one event a pass
        users, items = user[kept], item[kept]
        stay = np.bincount(users, minlength=1)[users] >= k
        stay &= np.bincount(items, minlength=1)[items] >= k
        if stay.all():
            break
        kept = kept[stay]
    else:
        kept = kept[_peel(user[kept], item[kept], k)]
    mask = np.zeros(len(user), dtype=bool)
    mask[kept] = True
    return mask


def _peel(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """The same with a queue: every user and item is taken from it once, with its events."""
    ends = (user, item)
    orders = [np.argsort(end, kind="stable") for end in ends]
    degrees = [np.bincount(end, minlength=1) for end in ends]
    starts = [np.concatenate(([0], np.cumsum(degree))) for degree in degrees]
    keep = np.ones(len(user), dtype=bool)
    queue = [
        (side, int(node))
        for side, degree in enumerate(degrees)
        for node in np.flatnonzero((degree > 0) & (degree < k))
    ]
    while queue:
        side, node = queue.pop()
        events = orders[side][starts[side][node] : starts[side][node + 1]]
        events = events[keep[events]]
        keep[events] = False
        degree = degrees[1 - side]
        for other in ends[1 - side][events].tolist():
            degree[other] -= 1
            if degree[other] == k - 1:
                queue.append((1 - side, other))
    return keep
