# SPDX-License-Identifier: Apache-2.0
"""The targets of users, and what they are ranked against where these are not all items.

Legend: U users, P pairs of a user and a target.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrec.data.errors import DataError
from fastrec.data.ids import Ids
from fastrec.data.prepare.text import read_fields

_ROUNDS = 4  # of rejection, before a user whose history is most of the events costs O(items)


def held_out_items(dataset, users: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """(items, places of their users in `users`), int64 [P]: the targets user by user, in the order
    of the events; an item that occurs again counts once."""
    batch = dataset.held_out(users, split)
    owner = batch.segment_ids()
    _, first = np.unique((owner * dataset.num_items + batch.values).numpy(), return_index=True)
    kept = torch.from_numpy(np.sort(first))
    return batch.values[kept], owner[kept]


def sampled_negatives(
    dataset, users: Tensor, count: int, seed: int, by: str = "popularity"
) -> Tensor:
    """int64 [U, count] negatives of `users`: unseen and all different, drawn in proportion to the
    interactions of an item, or "uniform".

    Draws come in turn, and one that is seen or already taken is rejected, which is sampling
    without replacement. After `_ROUNDS` x 2 `count` draws the rest comes from exponential keys: the
    same law, because what is drawn next depends on what is taken and not on how long it took. The
    negatives of a user depend on (seed, user) only.

    Raises ValueError when a user has fewer than `count` unseen items (with interactions).
    """
    popularity = np.ones(dataset.num_items, dtype=np.int64)
    if by == "popularity":
        popularity = np.bincount(np.asarray(dataset.values), minlength=dataset.num_items)
    alive = np.flatnonzero(popularity)
    cumulative = np.cumsum(popularity)
    out = np.empty((len(users), count), dtype=np.int64)
    values, offsets = np.asarray(dataset.values), np.asarray(dataset.offsets)
    for i, user in enumerate(users.tolist()):
        seen = np.unique(values[offsets[user] : offsets[user + 1]])
        if len(alive) - len(seen) < count:
            raise ValueError(
                f"user number {user}, from 0, has {len(alive) - len(seen)} unseen items, {count}"
                " negatives were asked for: lower evaluation.negatives"
            )
        generator = np.random.Generator(np.random.Philox(key=(seed, user)))
        taken = np.empty(0, dtype=np.int64)
        for _ in range(_ROUNDS):
            ticks = generator.integers(0, cumulative[-1], size=2 * count)
            drawn = np.searchsorted(cumulative, ticks, side="right")
            taken = np.concatenate((taken, drawn[~np.isin(drawn, seen)]))
            taken = taken[np.sort(np.unique(taken, return_index=True)[1])]
            if len(taken) >= count:
                break
        else:
            left = alive[~np.isin(alive, np.concatenate((seen, taken)))]
            keys = generator.standard_exponential(len(left)) / popularity[left]
            taken = np.concatenate((taken, left[keys.argsort()]))
        out[i] = taken[:count]
    return torch.from_numpy(out)


def listed_negatives(dataset, users: Tensor, file: Path | str) -> Tensor:
    """int64 [U, C]: the negatives of `users` in a file with a line `user item item ..` for each, in
    original ids: the `*_sample.txt` of S3-Rec.

    Raises DataError that names file and row: a user twice, a line of another length, an item or a
    user that is not known or not there.
    """
    lines = read_fields(file)
    items, people = Ids(dataset.item_ids()), Ids(dataset.user_ids())
    found: dict[int, list[int]] = {}
    for row, (user, *listed) in enumerate(lines, 1):
        if len(listed) != len(lines[0]) - 1 or not listed:
            raise DataError(
                file, f"{len(listed)} items, the first line has {len(lines[0]) - 1}", row=row
            )
        (owner,), rows = people.find([user]), items.find(listed)
        if -1 in (owner, *rows):
            what = f"item {listed[rows.index(-1)]!r}" if -1 in rows else f"user {user!r}"
            raise DataError(file, f"{what} is not in {dataset.path}", row=row)
        if owner in found:
            raise DataError(file, f"user {user!r} is listed twice", row=row)
        found[owner] = rows
    missing = [user for user in users.tolist() if user not in found]
    if missing:
        raise DataError(
            file, f"{len(missing)} of {len(users)} users have no line, the first is"
            f" {str(people.ids[missing[0]])!r}",
        )  # fmt: skip
    return torch.tensor([found[user] for user in users.tolist()], device="cpu")
