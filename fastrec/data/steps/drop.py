# SPDX-License-Identifier: Apache-2.0
"""Some items of each sequence are left out."""

from dataclasses import dataclass

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.mask import running
from fastrec.random import Rng, draws, threshold


@dataclass(frozen=True)
class Drop:
    """Leave each item out with probability `share`; the others close up (UniSRec, Hou et al., 2022,
    section 2.2). If none were left a drawn one stays; [MASK] stays.

    Attributes:
        share: of the items, rounded to 2^-16.
    """

    share: float = 0.2

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"drop.share must be in (0, 1), got {self.share}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        segment, position = batch.segment_ids(), batch.positions()
        drawn = draws(rng, batch.keys[segment], 0, position, site="drop")
        kept = (drawn >= threshold(self.share)) | (batch.values >= side.num_items)
        pick = draws(rng, batch.keys, 0, torch.zeros_like(batch.keys), site="drop_kept")
        chosen = (pick * batch.lengths >> 16)[segment] == position
        empty = running(kept)[batch.offsets].diff() == 0
        return batch.where(kept | (chosen & empty[segment]))
