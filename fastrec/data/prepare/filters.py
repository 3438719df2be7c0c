# SPDX-License-Identifier: Apache-2.0
"""Which events `prepare` keeps, and what it says of the others.

Legend: E events.
"""

from typing import NamedTuple

import numpy as np

from fastrec.data.errors import DataError
from fastrec.data.prepare.k_core import k_core_mask


class Filters(NamedTuple):
    """As `prepare` takes them, and applied in the order min_rating, max_users, k_core."""

    k_core: int = 0
    min_rating: float | None = None
    max_users: int | None = None


def kept_events(raw, user: np.ndarray, item: np.ndarray, filters: Filters, removed: dict):
    """bool [E]: the events of `raw` that are left. user, item: int64 [E], numbers of their ids.
    removed: gets how many went, by reason.

    Raises DataError where nothing is left, and for a rating rule without ratings.
    """
    k_core, min_rating, max_users = filters
    keep = np.ones(len(user), dtype=bool)
    if min_rating is not None:
        if "rating" not in raw.interactions.columns:
            raise DataError(
                raw.source,
                "--min_rating needs ratings: --rating_column names them",
                column="rating",
            )
        keep &= raw.interactions["rating"].to_numpy() >= min_rating
        _count(removed, raw.source, f"interactions rated below {min_rating:g}", keep)
    if max_users is not None:
        kept = np.unique(user[keep])[:max_users]
        inside = np.isin(user, kept)
        _count(removed, raw.source, f"interactions beyond {max_users} users", inside, keep)
        keep &= inside
    if k_core > 1:
        rows = np.flatnonzero(keep)
        core = k_core_mask(user[rows], item[rows], k_core)
        if not core.all():
            gone_users = len(np.unique(user[rows])) - len(np.unique(user[rows[core]]))
            gone_items = len(np.unique(item[rows])) - len(np.unique(item[rows[core]]))
            reason = f"({gone_users:,} users, {gone_items:,} items) outside the {k_core}-core"
            removed[f"interactions {reason}"] = int((~core).sum())
        keep[rows[~core]] = False
        if not keep.any():
            raise DataError(raw.source, f"no interaction is left in the {k_core}-core")
    return keep


def _count(removed: dict, source: str, reason: str, kept: np.ndarray, of=None) -> None:
    of = np.ones(len(kept), dtype=bool) if of is None else of
    add(removed, reason, int((of & ~kept).sum()))
    if not (of & kept).any():
        raise DataError(source, f"no interaction is left: {reason} were removed")


def add(removed: dict, reason: str, count: int) -> None:
    if count:
        removed[reason] = count
