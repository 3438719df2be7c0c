# SPDX-License-Identifier: Apache-2.0
"""Every event predicts what follows it: the targets of a causal model."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastrec.data.batch import NO_TARGET, JaggedBatch, offsets_of, spans
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.random import Rng


@dataclass(frozen=True)
class NextItem:
    """Take the last item off each sequence and let every event predict the one behind it (SASRec,
    Kang and McAuley, 2018, section 3.5; GRU4Rec).

    Attributes:
        positions: "all" events predict (shifted training), or the "last" one of each sequence
            (one sample of prefix training).
        ahead: items that an event predicts; with more than one, targets are [T, ahead] (Caser).
    """

    positions: Literal["all", "last"] = "all"
    ahead: int = 1

    extra = 1  # an item more than the model reads: the target of its last event
    asks = "last"
    before = ("mask", "last")  # it makes targets of every event

    def __post_init__(self):
        check_fields(self)
        if self.ahead < 1:
            raise ValueError(f"next_item.ahead must be at least 1, got {self.ahead}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        kept = (batch.lengths - 1).clamp_min(0)
        offsets = offsets_of(kept)
        index = spans(batch.offsets[:-1], kept, offsets)
        out = batch.with_events(index, offsets, max(batch.max_seq_len - 1, 0))
        end = batch.offsets[1:].repeat_interleave(kept, output_size=len(index)).unsqueeze(1)
        places = index.unsqueeze(1) + torch.arange(1, self.ahead + 1, device="cpu")
        target = batch.values[places.clamp_max(max(len(batch.values) - 1, 0))]
        target = target.masked_fill((places >= end) | (target >= side.num_items), NO_TARGET)
        if self.positions == "last":
            last = torch.zeros(len(index), dtype=torch.bool, device="cpu")
            last[offsets[1:][kept > 0] - 1] = True
            target = target.masked_fill(~last.unsqueeze(1), NO_TARGET)
        columns = {"target": target}
        if "click" in batch.events:  # of the target
            label = batch.events["click"][places.clamp_max(max(len(batch.values) - 1, 0))]
            columns["click"] = label.masked_fill(target == NO_TARGET, -1)
        if self.ahead == 1:
            columns = {name: column.squeeze(1) for name, column in columns.items()}
        return replace(out, events={**out.events, **columns})
