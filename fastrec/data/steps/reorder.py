# SPDX-License-Identifier: Apache-2.0
"""A run of items of each sequence in another order."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.data.steps.crop import segment, within
from fastrec.data.steps.share import Rounding, Share, check_share, share_at
from fastrec.random import Rng, wide_draws


@dataclass(frozen=True)
class Reorder:
    """Shuffle a run of floor(share n) of the n items of a sequence that starts anywhere (CL4SRec,
    Xie et al., 2022, section 3.2.3).

    Attributes:
        share: of the items, a number or one that moves with the step.
        round: "down", or "up" for ceil(share n) (AdaptSSR).
        least: items of the shortest sequence that is reordered.
    """

    share: Share = 0.6
    round: Rounding = "down"
    least: int = 1

    before = ("last",)  # what an event predicts could come to stand in front of it

    def __post_init__(self):
        check_fields(self)
        check_share("reorder.share", self.share)
        if self.least < 1:
            raise ValueError(f"reorder.least must be at least 1, got {self.least}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        start, length = segment(batch, rng, share_at(self.share, rng), "reorder", self.round)
        length = length.masked_fill(batch.lengths < self.least, 0)
        run = within(batch, start, length).nonzero().squeeze(1)
        owner, position = batch.segment_ids()[run], batch.positions()[run]
        key = wide_draws(rng, batch.keys[owner], position, site="reorder_key")
        index = torch.arange(len(batch.values), device="cpu")
        index[run] = run[(owner << 32 | key).argsort(stable=True)]
        return batch.with_events(index, batch.offsets, batch.max_seq_len)
