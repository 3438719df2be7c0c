# SPDX-License-Identifier: Apache-2.0
"""A window of consecutive events of each sequence, another one in the next view."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.share import Share, check_share, number_of, share_at
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class Window:
    """Keep k consecutive ones of the n events of a sequence, floor(share n) of them but at least
    one, or `count` of them but at most all. Every start is as likely as another. Unlike `crop`,
    views whose numbers differ by one keep different windows wherever there are two.

    Attributes:
        share: of the events, a number or one that moves with the step.
        count: of the events.
    """

    share: Share | None = None
    count: int | None = None

    def __post_init__(self):
        if (self.share is None) == (self.count is None):
            raise ValueError("window.share and window.count: exactly one of them is set")
        if self.share is not None:
            check_share("window.share", self.share)
        if self.count is not None and self.count < 1:
            raise ValueError(f"window.count must be at least 1, got {self.count}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        lengths = batch.lengths
        if self.count is not None:
            kept = lengths.clamp_max(self.count)
        elif self.share is not None:
            kept = number_of(share_at(self.share, rng), lengths).minimum(lengths)
        starts, zero = lengths - kept + 1, torch.zeros_like(lengths)
        # Of the user, not of the view: views go on from one start by the same stride.
        first, stride = (draws(rng, batch.sample_ids, row, zero, site="window") for row in (0, 1))
        stride = 1 + (stride * (starts - 1) >> 16)
        start = ((first * starts >> 16) + (batch.keys >> 32) * stride) % starts
        return batch.runs(start, kept)
