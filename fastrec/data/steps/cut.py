# SPDX-License-Identifier: Apache-2.0
"""The end of each sequence is cut off and predicted from what is left."""

from dataclasses import dataclass, replace

import torch

from fastrec.data.batch import NO_TARGET, JaggedBatch, offsets_of, spans
from fastrec.data.side import SideData
from fastrec.data.steps.mask import beside, without_gaps
from fastrec.random import Rng


@dataclass(frozen=True)
class Cut:
    """Take the last items off each sequence; a [MASK] in their place predicts every one of them
    (next K behaviours prediction of PTUM, Wu et al., 2020, section 3.2). Of n items at most n - 1
    are taken, of one item this one. Targets are [T, last]; those that others have stay.

    Attributes:
        last: K, how many items.
    """

    last: int = 2

    asks = "mask"

    def __post_init__(self):
        if self.last < 1:
            raise ValueError(f"cut.last must be at least 1, got {self.last}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        lengths = batch.lengths
        taken = (lengths - 1).clamp_min(1).clamp_max(self.last).minimum(lengths)
        kept = lengths - taken + (lengths > 0).long()  # the first that is taken becomes [MASK]
        offsets = offsets_of(kept)
        index = spans(batch.offsets[:-1], kept, offsets)
        out = batch.with_events(index, offsets, batch.max_seq_len)
        place = offsets[1:][kept > 0] - 1
        ahead = torch.arange(self.last, device="cpu")
        source = index[place].unsqueeze(1) + ahead
        target = batch.values[source.clamp_max(max(len(batch.values) - 1, 0))]
        beyond = ahead >= taken[kept > 0].unsqueeze(1)
        targets = target.new_full((len(index), self.last), NO_TARGET)
        targets[place] = target.masked_fill(beyond | (target >= side.num_items), NO_TARGET)
        first = torch.zeros_like(out.values, dtype=torch.bool).index_fill_(0, place, True)
        targets = beside(out.events.get("target"), targets, first)
        out = out.with_items(out.values.masked_fill(first, side.mask_id), first, asked=True)
        return without_gaps(replace(out, events={**out.events, "target": targets}), first)
