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
from fastrec.data.negatives import MOST_DRAWN, NegativeSampler
from fastrec.data.text_files import read_fields
from fastrec.evaluation.blocks import row_blocks
from fastrec.random import Rng

_ROUNDS = 4  # of rejection, before a user whose history is most of the events costs O(items)


def held_out_items(dataset, users: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """(items, places of their users in `users`), int64 [P]: the targets user by user, in the order
    of the events; an item that occurs again counts once."""
    batch = dataset.held_out(users, split)
    owner = batch.segment_ids()
    _, first = np.unique((owner * dataset.num_items + batch.values).numpy(), return_index=True)
    kept = torch.from_numpy(np.sort(first))
    return batch.values[kept], owner[kept]


def events_of(dataset, users: Tensor) -> Tensor:
    """int64, ascending: place of a user in `users` x V + item, of all their events, once each."""
    offsets = dataset.offsets
    batch = dataset.between(users, offsets[users.numpy()], offsets[users.numpy() + 1])
    return (batch.segment_ids() * dataset.num_items + batch.values).unique()


class SampledNegatives:
    """Negatives of users, unseen and all different, drawn in proportion to the interactions of an
    item, or "uniform".

    Draws come in turn, and one that is seen or already taken is rejected, which is sampling
    without replacement. After `_ROUNDS` turns the rest comes from exponential keys: the same law,
    because what is drawn next depends on what is taken and not on how long it took. The negatives
    of a user depend on (seed, user) only.
    """

    def __init__(self, dataset, count: int, seed: int, by: str = "popularity"):
        self.dataset, self.count, self.seed = dataset, count, seed
        self.popularity = torch.ones(dataset.num_items, dtype=torch.int64, device="cpu")
        if by == "popularity":
            counts = np.bincount(np.asarray(dataset.values), minlength=dataset.num_items)
            self.popularity = torch.from_numpy(counts)
        self.sampler = NegativeSampler.popularity(self.popularity)
        self.alive = int((self.popularity > 0).sum())

    def check(self, users: Tensor) -> None:
        """Raise ValueError where one has fewer than `count` unseen items (with interactions)."""
        offsets, places = np.asarray(self.dataset.offsets), users.numpy()
        lengths = torch.from_numpy(offsets[places + 1] - offsets[places])
        long = users[lengths > self.alive - self.count]
        for rows in row_blocks(len(long)):
            unseen = self.alive - (
                events_of(self.dataset, long[rows]) // self.dataset.num_items
            ).bincount(minlength=rows.stop - rows.start)
            if (unseen < self.count).any():
                bad = int((unseen < self.count).nonzero()[0])
                advice = "lower evaluation.negatives"
                if unseen[bad] == 0:
                    advice = "full candidates, or users without this one (users.fraction)"
                raise ValueError(
                    f"user number {int(long[rows][bad])}, from 0, has {int(unseen[bad])} unseen"
                    f" items, {self.count} negatives were asked for: {advice}"
                )

    def __call__(self, users: Tensor) -> Tensor:
        """int64 [U, count] of `users`, who pass `check`."""
        out = torch.empty(len(users), self.count, dtype=torch.int64, device="cpu")
        seen, rows = events_of(self.dataset, users), torch.arange(len(users), device="cpu")
        drawn = torch.empty(len(users), 0, dtype=torch.int64, device="cpu")
        for turn in range(_ROUNDS):
            number = min(self.count + self.count // 2 + 8, MOST_DRAWN)
            keys, place = users[rows], torch.zeros_like(rows)
            rng = Rng(self.seed, turn)
            more = self.sampler.own(number, rng, keys, place, "evaluation_negatives")
            drawn = torch.cat([drawn, more], 1)
            kept = ~_among(rows[:, None] * self.dataset.num_items + drawn, seen) & _first(drawn)
            enough = kept.sum(1) >= self.count
            taken = kept[enough] & (kept[enough].cumsum(1) <= self.count)
            out[rows[enough]] = drawn[enough][taken].view(-1, self.count)
            rows, drawn, kept = rows[~enough], drawn[~enough], kept[~enough]
            if len(rows) == 0:
                return out
        for number, row in enumerate(rows.tolist()):  # rare: the history is most of the events
            taken = drawn[number][kept[number]] if _ROUNDS else drawn[number]
            out[row] = self._rest(int(users[row]), taken)
        return out

    def _rest(self, user: int, taken: Tensor) -> Tensor:
        """int64 [count]: `taken`, and behind them others in the order of exponential keys."""
        left = self.popularity > 0
        left[taken] = False
        left[events_of(self.dataset, torch.tensor([user], device="cpu"))] = False
        left = left.nonzero().squeeze(1)
        generator = np.random.Generator(np.random.Philox(key=(self.seed, user)))
        keys = torch.from_numpy(generator.standard_exponential(len(left)))
        order = (keys / self.popularity[left]).argsort()
        return torch.cat([taken, left[order]])[: self.count]


def sampled_negatives(
    dataset, users: Tensor, count: int, seed: int, by: str = "popularity"
) -> Tensor:
    """int64 [U, count]: `SampledNegatives` of `users`. Raises ValueError as its `check` does."""
    draw = SampledNegatives(dataset, count, seed, by)
    draw.check(users)
    return torch.cat([draw(users[rows]) for rows in row_blocks(len(users))])


def _among(keys: Tensor, known: Tensor) -> Tensor:
    """bool, which of `keys` are in `known`, ascending."""
    if len(known) == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    return known[torch.searchsorted(known, keys).clamp_max(len(known) - 1)] == keys


def _first(drawn: Tensor) -> Tensor:
    """bool [U, K]: an item that does not stand further left in its row."""
    ordered, place = drawn.sort(dim=1, stable=True)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(new).scatter_(1, place, new)


def listed_negatives(dataset, users: Tensor, file: Path | str) -> Tensor:
    """int64 [U, C]: the negatives of `users` in a file with a line `user item item ..` for each, in
    original ids: the `*_sample.txt` of S3-Rec.

    Raises DataError that names file and row: a user twice, a line of another length, an item or a
    user that is not known or not there, an item that stands twice in a line or that is an event of
    its user, which a negative is not.
    """
    lines = read_fields(file)
    items, people = Ids(dataset.item_ids()), Ids(dataset.user_ids())
    found: dict[int, list[int]] = {}
    row_of: dict[int, int] = {}
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
        found[owner], row_of[owner] = rows, row
    missing = [user for user in users.tolist() if user not in found]
    if missing:
        raise DataError(
            file, f"{len(missing)} of {len(users)} users have no line, the first is"
            f" {str(people.ids[missing[0]])!r}",
        )  # fmt: skip
    negatives = torch.tensor([found[user] for user in users.tolist()], device="cpu")
    for block in row_blocks(len(users)):
        part, owners = negatives[block], users[block]
        places = torch.arange(len(part), device="cpu")[:, None] * dataset.num_items + part
        seen = _among(places, events_of(dataset, owners))
        for wrong, what in ((~_first(part), "stands twice"), (seen, "is an event of the user")):
            if wrong.any():
                at, place = (int(each) for each in wrong.nonzero()[0])
                raise DataError(
                    file,
                    f"item {str(items.ids[int(part[at, place])])!r} {what}: it is no negative",
                    row=row_of[int(owners[at])],
                )  # fmt: skip
    return negatives
