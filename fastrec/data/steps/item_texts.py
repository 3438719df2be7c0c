# SPDX-License-Identifier: Apache-2.0
"""Tokens of items: a history, and the item that it is followed by."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.random import Rng, draws


@dataclass(frozen=True)
class ItemTexts:
    """One item of each sequence is the target: keep the tokens of that item alone, or those of the
    items before it, whose `item_place` then counts from the latest of them (Recformer, Li et al.,
    2023, section 3.2.1). Views with the same `target` have the same target. Of a user with one item
    nothing is before it.

    Attributes:
        keep: "target", or what is "before" it.
        target: the "last" item, or a "random" one that is not the oldest that is read: more pairs
            of a history and an item.
    """

    keep: Literal["before", "target"] = "before"
    target: Literal["last", "random"] = "last"

    of_texts = True

    def __post_init__(self):
        check_fields(self)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        place, owner = batch.events["item_place"], batch.segment_ids()
        target = torch.zeros_like(batch.keys)
        if self.target == "random":
            # Of the user and not of the view: all views have the same target.
            drawn = draws(rng, batch.sample_ids, 0, target, site="item_texts")
            last = target.scatter_reduce(0, owner, place, "amax")  # of the oldest item
            target = drawn * last >> 16
        kept = place == target[owner] if self.keep == "target" else place > target[owner]
        made = batch.where(kept)
        shift = target if self.keep == "target" else target + 1
        place = made.events["item_place"] - shift[made.segment_ids()]
        return replace(made, events={**made.events, "item_place": place})
