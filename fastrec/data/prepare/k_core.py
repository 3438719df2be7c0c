# SPDX-License-Identifier: Apache-2.0
"""The k-core of the interactions: every user and every item in it has k events or more, repeated
pairs of them too. It is unique: what is below k goes until nothing is. Letters: E events, U users,
V items."""

from collections.abc import Callable, Iterable
from itertools import count

import numpy as np

Events = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # users and items of chunks

_PASSES = 20
_FEW = 1 << 22  # events that are held in memory


def core_counts(
    events: Events, by_user: np.ndarray, by_item: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [U], int64 [V]): how many events of the k-core each user and item has, 0 for one that
    is not in it. by_user, by_item: the same of those that are in now.

    A pass over all events takes away what is below k. A chain loses one event a pass: what is left
    after some passes is taken into memory once it is few, and done with a queue.
    """
    for number in count(1):
        users, items = by_user >= k, by_item >= k
        if (users == (by_user > 0)).all() and (items == (by_item > 0)).all():
            break
        if number > _PASSES and by_user.sum() <= _FEW:
            inside = [inside_of(users, items, *chunk) for chunk in events()]
            user, item = (np.concatenate(ends) for ends in zip(*inside, strict=True))
            keep = _peel(user, item, k)
            by_user = np.bincount(user[keep], minlength=len(by_user))
            by_item = np.bincount(item[keep], minlength=len(by_item))
            break
        by_user, by_item = counts(events, users, items)
    return by_user, by_item


def counts(events: Events, users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [U], int64 [V]): events of each user and item with both ends in bool [U] and [V]."""
    by_user, by_item = (np.zeros(len(each), dtype=np.int64) for each in (users, items))
    for chunk in events():
        user, item = inside_of(users, items, *chunk)
        by_user += np.bincount(user, minlength=len(users))
        by_item += np.bincount(item, minlength=len(items))
    return by_user, by_item


def inside_of(users, items, user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = users[user] & items[item]
    return user[keep], item[keep]


def _peel(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """bool [E]: the events of the k-core, by a queue: every user and item is taken from it once,
    with its events."""
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
