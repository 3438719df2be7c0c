# SPDX-License-Identifier: Apache-2.0
"""Which events are clicks, where not all are.

Legend: T events.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.random import Rng


@dataclass(frozen=True)
class Click:
    """Label each event by its rating, the column `click` (int64 [T]): 1 from `least` on, 0 below,
    -1 without a rating. A label is that of an item: `next_item` and `permute` give it to the event
    that predicts the item, and that [MASK] keeps it where the item was. A log of impressions is a
    source whose rating is 1 where the item was clicked and 0 where not (`least: 1`).

    Attributes:
        least: rating of a click.
    """

    least: float = 4.0

    event_columns: ClassVar[tuple[str, ...]] = ("rating",)
    before = ("mask", "last")  # these give the label to the event that is asked

    def __post_init__(self):
        if not math.isfinite(self.least):
            raise ValueError(f"click.least must be finite, got {self.least}")

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        if "rating" not in batch.events:
            raise ValueError(
                "the step click needs the event column 'rating': gather the batch with"
                " columns=['rating']"
            )
        rating = batch.events["rating"]
        label = (rating >= self.least).long().masked_fill(rating.isnan(), -1)
        return replace(batch, events={**batch.events, "click": label})
