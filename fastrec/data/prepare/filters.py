# SPDX-License-Identifier: Apache-2.0
"""Which events `prepare` keeps, and what it says of the others.

Legend: E events, U users, V items.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastrec.data.errors import DataError
from fastrec.data.prepare.k_core import core_counts, counts
from fastrec.data.prepare.store import Store


class Filters(NamedTuple):
    """As `prepare` takes them, and applied in the order min_rating, max_users, k_core."""

    k_core: int = 0
    min_rating: float | None = None
    max_users: int | None = None


class Kept:
    """The events of a `Store` that are left, their users and items numbered anew.

    user: int32 [U] and item: integers [V], the new number of each old one, -1 for none. lengths:
    int64 [U'], events of each user that is left. height: of all.
    """

    def __init__(self, events: Store, user, item, lengths, min_rating: float | None):
        self.events, self.user, self.item, self.lengths = events, user, item, lengths
        self.height = int(lengths.sum())
        self._min_rating = min_rating

    def chunks(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """user and item, int64 in new numbers, and the columns `names` of chunks of events, sorted
        by user and in time order inside a user."""
        for chunk in _rated(self.events, self._min_rating, *names):
            user, item = self.user[chunk.pop("user")], self.item[chunk.pop("item")]
            keep = (user >= 0) & (item >= 0)
            made = {"user": user[keep].astype(np.int64), "item": item[keep].astype(np.int64)}
            yield made | {name: chunk[name][keep] for name in names}


def kept_events(
    source: str, events: Store, num_users: int, num_items: int, filters: Filters, removed: dict
) -> tuple[np.ndarray, np.ndarray, Kept]:
    """(the users that are left, the items, ascending numbers of `events`, their events).

    events: sorted by user. removed: gets how many went, by reason.

    Raises DataError where nothing is left, and for a rating rule without ratings.
    """
    k_core, min_rating, max_users = filters
    if min_rating is not None and "rating" not in events.dtypes:
        raise DataError(
            source, "--min_rating needs ratings: --rating_column names them", column="rating"
        )

    def passed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for chunk in _rated(events, min_rating):
            yield chunk["user"], chunk["item"]

    everybody, everything = np.ones(num_users, dtype=bool), np.ones(num_items, dtype=bool)
    by_user, by_item = counts(passed, everybody, everything)
    left = int(by_user.sum())
    if min_rating is not None:
        reason = f"interactions rated below {min_rating:g}"
        _count(removed, source, reason, events.height - left, left)
    if max_users is not None:
        first = np.flatnonzero(by_user)[:max_users]
        everybody = np.zeros(num_users, dtype=bool)
        everybody[first] = True
        beyond = left - int(by_user[first].sum())
        _count(removed, source, f"interactions beyond {max_users} users", beyond, left - beyond)
        by_user, by_item = counts(passed, everybody, everything)
    if k_core > 1:
        before = by_user, by_item
        by_user, by_item = core_counts(passed, by_user, by_item, k_core)
        gone = int(before[0].sum() - by_user.sum())
        if gone:
            users, items = (
                int((old > 0).sum() - (new > 0).sum())
                for old, new in zip(before, (by_user, by_item), strict=True)
            )
            reason = f"({users:,} users, {items:,} items) outside the {k_core}-core"
            removed[f"interactions {reason}"] = gone
        if not by_user.any():
            raise DataError(source, f"no interaction is left in the {k_core}-core")
    used_users, used_items = np.flatnonzero(by_user), np.flatnonzero(by_item)
    user, item = (_numbers(used, of) for used, of in ((used_users, by_user), (used_items, by_item)))
    return used_users, used_items, Kept(events, user, item, by_user[used_users], min_rating)


def _rated(events: Store, least: float | None, *names: str) -> Iterator[dict[str, np.ndarray]]:
    """user, item and `names` of the events that are rated `least` or more, in float32 as ratings
    are: a threshold in float64, as quantiles are, would be above the rating that it is made of."""
    wanted = {"user", "item", *names} | ({"rating"} if least is not None else set())
    for chunk in events.chunks(*wanted):
        if least is not None:
            keep = chunk["rating"] >= np.float32(least)
            chunk = {name: values[keep] for name, values in chunk.items()}
        yield chunk


def _numbers(used: np.ndarray, of: np.ndarray) -> np.ndarray:
    made = np.full(len(of), -1, dtype=np.int32)
    made[used] = np.arange(len(used), dtype=np.int32)
    return made


def _count(removed: dict, source: str, reason: str, count: int, left: int) -> None:
    count_removed(removed, reason, count)
    if not left:
        raise DataError(source, f"no interaction is left: {reason} were removed")


def count_removed(removed: dict, reason: str, count: int) -> None:
    if count:
        removed[reason] = count
