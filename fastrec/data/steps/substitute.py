# SPDX-License-Identifier: Apache-2.0
"""Some items of each sequence become similar ones."""

from dataclasses import dataclass, replace

from fastrec.data.batch import FILL, JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.mask import chosen_items
from fastrec.random import Rng


@dataclass(frozen=True)
class Substitute:
    """Put the most similar item in the place of floor(share n) of the n items of a sequence, at
    least one, drawn at random (CoSeRec, Liu et al., 2021).

    Which item is similar says `SideData.similar_items`; one that is like no other stays. A rating
    says something of its item: those of substituted items are hidden. Targets stay.

    Attributes:
        share: of the items.
    """

    share: float = 0.1

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"substitute.share must be in (0, 1], got {self.share}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        chosen = chosen_items(batch, rng, side, self.share, "substitute")
        similar = side.similar_items[batch.values.masked_fill(~chosen, 0)]
        chosen &= similar >= 0
        events = dict(batch.events)
        if "rating" in events:
            events["rating"] = events["rating"].masked_fill(chosen, FILL["rating"])
        return replace(batch, values=similar.where(chosen, batch.values), events=events)
