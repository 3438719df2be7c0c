# SPDX-License-Identifier: Apache-2.0
"""Similar items come in front of some items of each sequence."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrec.data.batch import FILL, JaggedBatch, offsets_of
from fastrec.data.side import SideData
from fastrec.data.steps.mask import chosen_items
from fastrec.random import Rng


@dataclass(frozen=True)
class Insert:
    """Put the most similar item in front of floor(share n) of the n items of a sequence, at least
    one, drawn at random (CoSeRec, Liu et al., 2021; the side is that of the authors' program). The
    latest items of what that makes are kept, as many as the model reads.

    Which item is similar says `SideData.similar_items`; nothing comes in front of one that is like
    no other. An inserted event predicts nothing, and has neither rating nor time.

    Attributes:
        share: of the items.
    """

    share: float = 0.4

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"insert.share must be in (0, 1], got {self.share}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        chosen = chosen_items(batch, rng, side, self.share, "insert")
        similar = side.similar_items[batch.values.masked_fill(~chosen, 0)]
        chosen &= similar >= 0
        before = offsets_of(chosen.long())  # inserted events before each event
        place = torch.arange(len(chosen), device="cpu") + before[1:]
        size = len(chosen) + int(before[-1])

        def spread(column: Tensor, fill: float) -> Tensor:
            out = column.new_full((size, *column.shape[1:]), fill)
            return out.index_copy_(0, place, column)

        values = spread(batch.values, 0)
        values[place[chosen] - 1] = similar[chosen]
        offsets = batch.offsets + before[batch.offsets]
        longer = replace(
            batch,
            values=values,
            offsets=offsets,
            max_seq_len=int(offsets.diff().max()) if len(batch) else 0,
            events={name: spread(each, FILL.get(name, 0)) for name, each in batch.events.items()},
            scored=None,
        )
        room = side.shard.max_len
        return longer if room is None else longer.last(room)
