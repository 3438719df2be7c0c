# SPDX-License-Identifier: Apache-2.0
"""Similar items come in front of some items of each sequence."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch, offsets_of, with_gaps
from fastrec.data.side import SideData
from fastrec.data.steps.share import check_share
from fastrec.data.steps.substitute import chosen_and_similar
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
        check_share("insert.share", self.share)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        chosen, similar = chosen_and_similar(batch, rng, side, self.share, "insert")
        before = offsets_of(chosen.long())  # inserted events before each event
        place = torch.arange(len(chosen), device="cpu") + before[1:]
        offsets = batch.offsets + before[batch.offsets]
        longest = int(offsets.diff().max()) if len(batch) else 0
        longer = with_gaps(batch, place, offsets, int(offsets[-1]), longest)
        longer.values[place[chosen] - 1] = similar[chosen]
        room = side.shard.max_len
        return longer if room is None else longer.last(room)
