# SPDX-License-Identifier: Apache-2.0
"""Masking: items become [MASK] and are the targets of their events.

Legend: B sequences, T events, N chosen events, V items.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrec.data.batch import FILL, NO_TARGET, JaggedBatch, columns_of, has_target, widened
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.data.steps.share import Rounding, Share, check_share, number_of, share_at
from fastrec.random import Rng, draws, threshold, wide_draws

_MAX_POSITIONS = 65536


@dataclass(frozen=True)
class Mask:
    """Choose items at random, put [MASK] in their place and make them the targets (BERT4Rec, Sun et
    al., 2019; UPRec, section 3.3.1).

    Whether an event is chosen depends on (seed, step, key, position) only. At least one item of a
    sequence is chosen, unless `leave` forbids it, or by chance where a step before this one has
    made a target there (S3-Rec: `mask_last`). Every chosen position is predicted.

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
        check_fields(self)
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
        if self.replace + self.random == 0:
            raise ValueError("mask.replace and mask.random are both 0: the input shows its targets")
        if self.replace + self.random > 1 + 1e-9:
            raise ValueError(
                f"mask.replace + mask.random must be at most 1, got {self.replace} + {self.random}"
            )

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        if batch.max_seq_len > _MAX_POSITIONS:
            raise ValueError(f"sequences may hold {_MAX_POSITIONS} events, got {batch.max_seq_len}")
        share = share_at(self.share, rng)
        if self.exact or self.count is not None:
            how = ("mask_exact", self.round, self.leave, self.count)
            chosen = chosen_items(batch, rng, side, share, *how)
        else:
            real = batch.values < side.num_items
            chosen = drawn_events(
                batch, rng, real, share, "mask_item", "mask_forced", batch.events.get("target")
            )
        masked = batch.values.masked_fill(chosen, side.mask_id)
        if self.replace < 1:
            masked = torch.where(chosen, self._replaced(batch, rng, side), masked)
        return with_targets(batch, masked, chosen)

    def _replaced(self, batch: JaggedBatch, rng: Rng, side: SideData) -> Tensor:
        """[T]: what stands in the place of an item if it is chosen."""
        keys, position = batch.keys[batch.segment_ids()], batch.positions()
        kind = draws(rng, keys, 0, position, site="mask_replace")
        item = wide_draws(rng, keys, position, site="mask_random_item") * side.num_items >> 32
        swapped = kind < threshold(min(1.0, self.replace + self.random))
        now = torch.where(swapped, item, batch.values)
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
        return without_gaps(with_targets(batch, masked, last), last)


def without_gaps(batch: JaggedBatch, asked: Tensor) -> JaggedBatch:
    """The batch where the events that are `asked`, bool [T], have no time gap: who is asked for
    what comes next is not told when."""
    gaps = batch.events.get("time_gap")
    if gaps is None:
        return batch
    hidden = gaps.masked_fill(asked, FILL["time_gap"])
    return replace(batch, events={**batch.events, "time_gap": hidden})


def with_targets(batch: JaggedBatch, values: Tensor, chosen: Tensor) -> JaggedBatch:
    """The batch with `values` [T], whose `chosen` events, bool [T], predict what stood there;
    targets that others have stay."""
    target = beside(batch.events.get("target"), batch.values, chosen)
    made = batch.with_items(values, chosen, asked=True)
    return replace(made, events={**made.events, "target": target})


def beside(before: Tensor | None, target: Tensor, chosen: Tensor) -> Tensor:
    """Targets [T] or [T, A] of the `chosen` events, bool [T]; others keep those that they had
    `before`, in as many columns as the wider of both has."""
    before = torch.full_like(target, NO_TARGET) if before is None else before
    columns = max(columns_of(before), columns_of(target))
    target, before = (widened(each, columns, "target") for each in (target, before))
    return torch.where(chosen.unsqueeze(1) if columns else chosen, target, before)


def drawn_events(
    batch: JaggedBatch,
    rng: Rng,
    real: Tensor,
    share: float,
    site: str,
    forced: str,
    target: Tensor | None = None,
) -> Tensor:
    """bool [T]: each of the `real` events, bool [T], with chance `share`, rounded to 2^-16; of a
    sequence where none is drawn, and none has a `target`, one, any with the same chance. Two sites
    of draws."""
    segment, position = batch.segment_ids(), batch.positions()
    drawn = draws(rng, batch.keys[segment], 0, position, site=site)
    chosen = (drawn < threshold(share)) & real
    served = chosen if target is None else chosen | has_target(target)
    empty = running(served)[batch.offsets].diff() == 0
    rank = running(real)  # real events before each event, over the whole batch
    first = rank[batch.offsets]
    count = first.diff()
    pick = draws(rng, batch.keys, 0, torch.zeros_like(count), site=forced)
    one = first[:-1] + (pick * count >> 16)
    return chosen | (real & empty[segment] & (rank[:-1] == one[segment]))


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
    key = wide_draws(rng, batch.keys[segment], position, site=site).masked_fill(~real, 1 << 32)
    order = (segment << 33 | key).argsort()
    place = torch.empty_like(order)
    place[order] = position  # sorted events keep their sequences
    number = number_of(share, count, rounding)
    if fixed is not None:
        number = torch.full_like(number, fixed)
    number = number.minimum(count - leave)
    return real & (place < number[segment])


def running(flags: Tensor) -> Tensor:
    """int64 [T + 1]: number of set flags before each event; the last entry is the total."""
    counts = flags.new_zeros(flags.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=counts[1:])
    return counts
