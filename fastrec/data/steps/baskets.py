# SPDX-License-Identifier: Apache-2.0
"""Two baskets: what was bought at one time, and perhaps what was bought next.

Legend: B sequences, T events.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrec.data.batch import SPECIAL_TOKENS, JaggedBatch, offsets_of, spans
from fastrec.data.side import SideData
from fastrec.data.steps.mask import running
from fastrec.random import Rng, draws, threshold, wide_draws


@dataclass(frozen=True)
class Baskets:
    """A random basket of each user, [SEP], and by chance either the basket behind it or one of
    another user (next basket prediction of Zeng et al., 2021, section 3.2.2, after BERT's next
    sentence). A basket is a run of events at the same time: the data set needs times.

    Columns: `segment` of events, 0 in the first basket and 1 in the second; `position`, 0 and 2 in
    them and 1 of [SEP], so that a basket has no order; `follows` of users, 1 or 0, -1 for a user
    with one basket, who has no second one. Where both together are longer than what the
    model reads, the longer one is cut first.

    Attributes:
        follow: chance that the second basket is the next one.
    """

    follow: float = 0.5

    event_columns = ("time_gap",)
    moves = True

    def __post_init__(self):
        if not 0 <= self.follow <= 1:
            raise ValueError(f"baskets.follow must be in [0, 1], got {self.follow}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        room = side.shard.max_len
        if room is not None and room < 3:
            raise ValueError(f"the step baskets needs model.max_len of at least 3, got {room}")
        drawn = _drawn_users(batch.keys, batch.sample_ids, rng, side)
        others = side.gather(drawn, room)
        zero = torch.zeros_like(batch.keys)
        starts, count, first = _baskets(batch)
        pick = draws(rng, batch.keys, 0, zero, site="basket") * (count - 1).clamp_min(1) >> 16
        theirs_starts, theirs_count, theirs_first = _baskets(others)
        other = draws(rng, batch.keys, 1, zero, site="basket") * theirs_count >> 16
        two = (count > 1) & (theirs_count > 0)
        follows = draws(rng, batch.keys, 2, zero, site="basket") < threshold(self.follow)
        follows = (follows | (drawn == batch.sample_ids)) & two  # where there is nobody else
        # Where a piece begins and ends, in the events of `batch` and behind them of `others`.
        both = JaggedBatch.cat([batch, others])
        shift = len(batch.values)
        begin, end = _span(starts, first + pick)
        next_begin, next_end = _span(starts, first + pick + 1)
        their_begin, their_end = _span(theirs_starts, theirs_first + other)
        second = torch.where(follows, next_begin, their_begin + shift)
        size = torch.where(follows, next_end - next_begin, their_end - their_begin)
        length = (end - begin).masked_fill(count == 0, 0)
        size = size.masked_fill(~two, 0)
        if room is not None:
            length, size = _fitting(length, size, room - two.long())
        whole = length + size + two.long()
        offsets = offsets_of(whole)
        index = spans(begin, whole, offsets)
        owner = torch.arange(len(batch), device="cpu").repeat_interleave(
            whole, output_size=len(index)
        )
        place = torch.arange(len(index), device="cpu") - offsets[:-1][owner]
        behind = place - length[owner]  # 0: [SEP], above: the second basket
        index = torch.where(behind > 0, second[owner] + behind - 1, index)
        index = index.clamp_max(max(len(both.values) - 1, 0))
        out = both.with_events(index, offsets, int(whole.max()) if len(whole) else 0)
        out = out.with_token(side.num_items + SPECIAL_TOKENS.index("sep"), behind == 0)
        columns = {"segment": (behind > 0).long(), "position": 1 + behind.sign()}
        return replace(
            out,
            keys=batch.keys,
            events={**out.events, **columns},
            users={**batch.users, "follows": follows.long().masked_fill(~two, -1)},
            pairs=batch.pairs,
        )


def _fitting(first: Tensor, second: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths of both baskets where the longer one is cut to what the other leaves of the room,
    as BERT cuts two sentences; int64 [B]."""
    first = first.minimum(torch.maximum(room - second, (room + 1) // 2))
    return first, second.minimum(room - first)


def _drawn_users(keys: Tensor, users: Tensor, rng: Rng, side: SideData) -> Tensor:
    """int64 [B]: another user of each, uniform among those whose sequences may be seen; the user
    itself where there is nobody else."""
    known = side.trained_users
    place = torch.searchsorted(known, users).clamp_max(len(known) - 1)
    itself = known[place] == users
    choices = (len(known) - itself.long()).clamp_min(1)
    drawn = wide_draws(rng, keys, torch.zeros_like(keys), site="basket_user") * choices >> 32
    return known[(drawn + (itself & (drawn >= place)).long()).clamp_max(len(known) - 1)]


def _baskets(batch: JaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(the first event of each basket and the end of the last; how many of each sequence [B]; the
    number of its first one [B])."""
    new = ~(batch.events["time_gap"] == 0) | (batch.positions() == 0)
    starts = torch.cat([new.nonzero().squeeze(1), batch.offsets[-1:]])
    before = running(new)[batch.offsets]
    return starts, before.diff(), before[:-1]


def _span(starts: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """(first event, end) of baskets by number; twice the end of the last one behind it."""
    last = len(starts) - 1
    return starts[number.clamp_max(last)], starts[(number + 1).clamp_max(last)]
