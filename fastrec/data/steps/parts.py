"""The steps that a recipe can name: a field each."""

from dataclasses import dataclass
from functools import cached_property

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import part_of
from fastrec.data.side import SideData
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Again
from fastrec.random import Rng


@dataclass(frozen=True)
class Step:
    """One step of a view: exactly one of these.

    Attributes:
        mask: items become [MASK] and are predicted.
        mask_last: the last item becomes [MASK] and is predicted.
        next_item: every event predicts the item behind it.
        friend: a drawn friend of each user joins the batch.
        again: the sequences of another view with new dropout.
    """

    mask: Mask | None = None
    mask_last: MaskLast | None = None
    next_item: NextItem | None = None
    friend: Friend | None = None
    again: Again | None = None

    def __post_init__(self):
        part_of(self)

    @cached_property
    def part(self):
        return part_of(self)

    @property
    def extra(self) -> int:
        return getattr(self.part, "extra", 0)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        return self.part(batch, rng, side)
