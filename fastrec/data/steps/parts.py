# SPDX-License-Identifier: Apache-2.0
"""The steps that a recipe can name: a field each."""

from dataclasses import dataclass
from functools import cached_property

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import part_of
from fastrec.data.side import SideData
from fastrec.data.steps.baskets import Baskets
from fastrec.data.steps.click import Click
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.drop import Drop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.item_texts import ItemTexts
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.mask_rating import MaskRating
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.segment import Segment
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.data.views import Again
from fastrec.random import Rng


@dataclass(frozen=True)
class Step:
    """One step of a view: exactly one of these.

    Attributes:
        mask: items become [MASK] and are predicted.
        mask_last: the last item becomes [MASK] and is predicted.
        click: events are labelled by their rating as clicks or as none.
        mask_rating: ratings of events are hidden and predicted, their items stay.
        next_item: every event predicts the item behind it.
        cut: the last items are cut off, and one [MASK] predicts them all.
        permute: items in a random order with their positions; each predicts the one behind it.
        baskets: two baskets of items, the second one the next or somebody else's.
        crop: a run of items is kept.
        prefix: the first events are kept, up to a drawn one.
        reorder: a run of items is shuffled.
        segment: a run of items is masked, or all others are.
        substitute: some items become similar ones.
        insert: similar items come in front of some items.
        drop: some items are left out.
        window: a window of events is kept, another one in the next view.
        fill: items are drawn anew by a masked-item model.
        one_of: one of several steps for each sequence, different ones in neighbouring views.
        any_of: the same, and every view chooses for itself.
        friend: a drawn friend of each user joins the batch.
        same_target: another sequence that ends with the same item, in the place of each.
        again: the sequences of another view with new dropout.
        item_texts: of the tokens of items those of one item, or of what is before it.
    """

    mask: Mask | None = None
    mask_last: MaskLast | None = None
    click: Click | None = None
    mask_rating: MaskRating | None = None
    next_item: NextItem | None = None
    cut: Cut | None = None
    permute: Permute | None = None
    baskets: Baskets | None = None
    crop: Crop | None = None
    prefix: Prefix | None = None
    reorder: Reorder | None = None
    window: Window | None = None
    fill: Fill | None = None
    drop: Drop | None = None
    substitute: Substitute | None = None
    insert: Insert | None = None
    segment: Segment | None = None
    one_of: "list[Step] | None" = None
    any_of: "list[Step] | None" = None
    friend: Friend | None = None
    same_target: SameTarget | None = None
    again: Again | None = None
    item_texts: ItemTexts | None = None

    def __post_init__(self):
        _ = self.part  # raises for none or several

    @cached_property
    def part(self):
        part = part_of(self)
        return OneOf(part, self.any_of is part) if isinstance(part, list) else part

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        return self.part(batch, rng, side)
