# SPDX-License-Identifier: Apache-2.0
"""Ratings are hidden and become the targets of their events; the items stay.

Legend: B sequences, T events.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fastrec.data.batch import FILL, JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.mask import drawn_events
from fastrec.data.steps.share import Share, check_share, share_at
from fastrec.random import Rng

TARGET = "rating_target"


@dataclass(frozen=True)
class MaskRating:
    """Choose rated events at random, hide their ratings and make these the targets, the column
    `rating_target` (float32 [T], NaN: none): rating prediction of Zeng et al., "Knowledge transfer
    via pre-training for recommendation: a review and prospect", 2021, section 4.

    Whether an event is chosen depends on (seed, step, key, position) only. At least one rated event
    of a sequence is chosen. An event without a rating has nothing to predict and is never chosen.

    Attributes:
        share: chance of each rated event, rounded to 2^-16; a number, or one that moves with the
            step.
        hide: false leaves the chosen ratings in the input: an autoencoder that reconstructs what it
            sees (encoder `bag`).
    """

    share: Share = 0.2
    hide: bool = True

    event_columns: ClassVar[tuple[str, ...]] = ("rating",)

    def __post_init__(self):
        check_share("mask_rating.share", self.share)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        if "rating" not in batch.events:
            raise ValueError(
                "mask_rating needs the event column 'rating': gather the batch with"
                " columns=['rating']"
            )
        rating = batch.events["rating"]
        sites = "mask_rating", "mask_rating_forced"
        chosen = drawn_events(batch, rng, ~rating.isnan(), share_at(self.share, rng), *sites)
        target = rating.masked_fill(~chosen, FILL[TARGET])
        seen = rating.masked_fill(chosen, FILL["rating"]) if self.hide else rating
        return replace(batch, events={**batch.events, "rating": seen, TARGET: target})
