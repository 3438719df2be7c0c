# SPDX-License-Identifier: Apache-2.0
"""Some items of each sequence become similar ones."""

from dataclasses import dataclass

from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.mask import chosen_items
from fastrec.data.steps.share import check_share
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
        check_share("substitute.share", self.share)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        chosen, similar = chosen_and_similar(batch, rng, side, self.share, "substitute")
        return batch.with_items(similar.where(chosen, batch.values), chosen)


def chosen_and_similar(
    batch: JaggedBatch, rng: Rng, side: SideData, share: float, site: str
) -> tuple[Tensor, Tensor]:
    """(bool [T], `chosen_items` that are like another; int64 [T], that one)."""
    chosen = chosen_items(batch, rng, side, share, site)
    similar = side.similar_items[batch.values.masked_fill(~chosen, 0)]
    return chosen & (similar >= 0), similar
