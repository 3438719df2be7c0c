# SPDX-License-Identifier: Apache-2.0
"""A run of consecutive items of each sequence, kept or dropped."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.data.steps.share import Rounding, Share, check_share, number_of, share_at
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Crop:
    """Keep a run of floor(keep n) of the n items of a sequence, at least one, that starts anywhere
    (CL4SRec, Xie et al., 2022, section 3.2.1); or drop a run of floor(drop n), at least one, and
    join what is left (CLUE, Cheng et al., 2021, section IV-B). A single item stays.

    Attributes:
        keep: share of the items, a number or one that moves with the step; 0.6 if neither keep nor
            drop is given.
        drop: share of the items, in place of keep.
        round: "down", or "up" for ceil (AdaptSSR).
        least: items of the shortest sequence that is cropped.
    """

    keep: Share | None = None
    drop: Share | None = None
    round: Rounding = "down"
    least: int = 1

    def __post_init__(self):
        check_fields(self)
        if self.drop is None and self.keep is None:
            object.__setattr__(self, "keep", 0.6)
        if self.drop is not None and self.keep is not None:
            raise ValueError(f"crop has keep, {self.keep}, and drop, {self.drop}: it takes one")
        if self.keep is not None:
            check_share("crop.keep", self.keep)
        if self.drop is not None:
            check_share("crop.drop", self.drop)
        if self.least < 1:
            raise ValueError(f"crop.least must be at least 1, got {self.least}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        short = batch.lengths < self.least
        if self.drop is not None:
            return self._without(batch, rng, share_at(self.drop, rng), short)
        assert self.keep is not None
        start, kept = segment(batch, rng, share_at(self.keep, rng), "crop", self.round)
        return batch.runs(start.masked_fill(short, 0), batch.lengths.where(short, kept))

    def _without(self, batch: JaggedBatch, rng: Rng, share: float, short: Tensor) -> JaggedBatch:
        start, length = segment(batch, rng, share, "crop", self.round)
        length = length.minimum((batch.lengths - 1).clamp_min(0)).masked_fill(short, 0)
        return batch.where(~within(batch, start, length))


def segment(
    batch: JaggedBatch, rng: Rng, share: float, site: str, rounding: Rounding = "down"
) -> tuple[Tensor, Tensor]:
    """(start, length) int64 [B] of a uniform run of `number_of` the n events; of an empty sequence
    (0, 0)."""
    lengths = batch.lengths
    kept = number_of(share, lengths, rounding).minimum(lengths)
    drawn = draws(rng, batch.keys, 0, torch.zeros_like(kept), site=site)
    return drawn * (lengths - kept + 1) >> 16, kept


def within(batch: JaggedBatch, start: Tensor, length: Tensor) -> Tensor:
    """bool [T]: the `length` events of each sequence from its place `start` on, int64 [B]."""
    owner, position = batch.segment_ids(), batch.positions()
    return (position >= start[owner]) & (position < (start + length)[owner])
