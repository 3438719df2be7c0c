# SPDX-License-Identifier: Apache-2.0
"""Masking: items become [MASK] and are the targets of their events.

Legend: B sequences, T events, N chosen events, V items.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrec.data.batch import FILL, NO_TARGET, JaggedBatch
from fastrec.data.settings import check_choices
from fastrec.data.side import SideData
from fastrec.data.steps.share import Rounding, Share, check_share, number_of, share_at
from fastrec.random import Rng, draws, threshold

_MAX_POSITIONS = 65536


@dataclass(frozen=True)
class Mask:
    """Choose items at random, put [MASK] in their place and make them the targets (BERT4Rec, Sun et
    al., 2019; UPRec, section 3.3.1).

    Whether an event is chosen depends on (seed, step, key, position) only. At least one item of a
    sequence is chosen, unless `leave` forbids it. Every chosen position is predicted.

    Attributes:
        share: chance of each item, rounded to 2^-16; a number, or one that moves with the step.
        exact: choose floor(share n) of the n items of a sequence instead (CL4SRec, Xie et al.,
            2022, section 3.2.2).
        round: of `exact`: "down", or "up" for ceil(share n) (AdaptSSR).
        leave: of `exact`: so many items of a sequence are never chosen.
        count: choose so many items of a sequence instead (PTUM, Wu et al., 2020: 1).
        replace, random: chance that a chosen item becomes [MASK], or a random item; otherwise it
            stays. BERT's 80/10/10 is 0.8 and 0.1.
    """

    share: Share = 0.2
    exact: bool = False
    round: Rounding = "down"
    leave: int = 0
    count: int | None = None
    replace: float = 1.0
    random: float = 0.0

    asks = "mask"

    def __post_init__(self):
        check_choices(self)
        if self.leave < 0:
            raise ValueError(f"mask.leave must not be negative, got {self.leave}")
        for name, default in (("round", "down"), ("leave", 0)):
            if not self.exact and getattr(self, name) != default:
                raise ValueError(f"mask.{name} has no effect: mask.exact is false")
        check_share("mask.share", self.share, zero=True)
        for name in ("replace", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mask.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.count is not None and (self.count < 1 or self.exact or self.share != 0.2):
            raise ValueError(
                f"mask.count must be at least 1, and stands for share and exact, got {self.count},"
                f" {self.share} and {self.exact}"
            )
        if self.replace + self.random > 1 + 1e-9:
            raise ValueError(
                f"mask.replace + mask.random must be at most 1, got {self.replace} + {self.random}"
            )

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        if batch.max_seq_len > _MAX_POSITIONS:
            raise ValueError(f"sequences may hold {_MAX_POSITIONS} events, got {batch.max_seq_len}")
        segment, position = batch.segment_ids(), batch.positions()
        keys, share = batch.keys[segment], share_at(self.share, rng)
        if self.exact or self.count is not None:
            how = ("mask_exact", self.round, self.leave, self.count)
            chosen = chosen_items(batch, rng, side, share, *how)
        else:
            real = batch.values < side.num_items
            rank = running(real)  # number of items before each event, over the whole batch
            items = rank[batch.offsets]
            count = items.diff()
            drawn = draws(rng, keys, 0, position, site="mask_item")
            chosen = (drawn < threshold(share)) & real
            empty = running(chosen)[batch.offsets].diff() == 0
            pick = draws(rng, batch.keys, 0, torch.zeros_like(count), site="mask_forced")
            forced = items[:-1] + (pick * count >> 16)
            chosen |= real & empty[segment] & (rank[:-1] == forced[segment])
        masked = batch.values.masked_fill(chosen, side.mask_id)
        if self.replace < 1:
            masked = torch.where(
                chosen, self._replaced(batch.values, rng, keys, position, side), masked
            )
        return with_targets(replace(batch, values=masked), chosen, batch.values)

    def _replaced(self, values: Tensor, rng: Rng, keys: Tensor, position: Tensor, side) -> Tensor:
        """[T]: what stands in the place of an item if it is chosen."""
        kind = draws(rng, keys, 0, position, site="mask_replace")
        high, low = (draws(rng, keys, row, position, site="mask_random_item") for row in (0, 1))
        item = (high << 16 | low) * side.num_items >> 32  # 1 / V to within 2^-32
        swapped = kind < threshold(min(1.0, self.replace + self.random))
        now = torch.where(swapped, item, values)
        return now.masked_fill(kind < threshold(self.replace), side.mask_id)


@dataclass(frozen=True)
class MaskLast:
    """Put [MASK] in the place of the last item of each sequence and predict it (fine-tuning for the
    next item: UPRec, section 3.5). A sequence without items has no target.

    Attributes:
        number: how many of the last items.
    """

    number: int = 1

    asks = "mask"

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"mask_last.number must be at least 1, got {self.number}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        real = batch.values < side.num_items
        rank = running(real)
        behind = rank[batch.offsets[1:]][batch.segment_ids()] - rank[:-1]  # items from here on
        last = real & (behind <= self.number)
        masked = batch.values.masked_fill(last, side.mask_id)
        return with_targets(replace(batch, values=masked), last, batch.values)


def with_targets(batch: JaggedBatch, chosen: Tensor, items: Tensor) -> JaggedBatch:
    """The batch whose `chosen` events [T] predict `items` [T]; targets that others have stay.

    A rating says something of its item: those of chosen events are hidden. The time since the event
    before does not: gaps stay.
    """
    before = batch.events.get("target")
    target = items.masked_fill(~chosen, NO_TARGET)
    if before is not None:
        target = torch.where(chosen, items, before)
    events = {**batch.events, "target": target}
    if "rating" in events:
        events["rating"] = events["rating"].masked_fill(chosen, FILL["rating"])
    return replace(batch, events=events)


def chosen_items(
    batch: JaggedBatch,
    rng: Rng,
    side: SideData,
    share: float,
    site: str,
    rounding: Rounding = "down",
    leave: int = 0,
    fixed: int | None = None,
) -> Tensor:
    """bool [T]: `number_of` the n items of each sequence, or the number that is `fixed`, but at
    most n - leave, any of them with the same chance. Special tokens are none."""
    segment, position = batch.segment_ids(), batch.positions()
    real = batch.values < side.num_items
    count = running(real)[batch.offsets].diff()
    key = random_order(rng, batch.keys[segment], position, site).masked_fill(~real, 1 << 32)
    order = (segment << 33 | key).argsort()
    place = torch.empty_like(order)
    place[order] = position  # sorted events keep their sequences
    number = number_of(share, count, rounding)
    if fixed is not None:
        number = torch.full_like(number, fixed)
    number = number.minimum(count - leave)
    return real & (place < number[segment])


def random_order(rng: Rng, keys: Tensor, position: Tensor, site: str) -> Tensor:
    """int64 [T], 32 random bits of each event: sorting by them shuffles."""
    rows = torch.arange(2, device=keys.device).unsqueeze(1)
    high, low = draws(rng, keys, rows, position, site=site)
    return high << 16 | low


def running(flags: Tensor) -> Tensor:
    """int64 [T + 1]: number of set flags before each event; the last entry is the total."""
    counts = flags.new_zeros(flags.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=counts[1:])
    return counts
