"""Masked item prediction (MIP): UPRec section 3.3, eq. 6-7; also BERT4Rec's objective.

Legend: T events, N masked positions, V items, D width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.corruptions import mask_items, mask_last
from fastrec.nn.user_model import UserModel


@dataclass(frozen=True)
class Masking:
    """Which items become [MASK].

    Attributes:
        last_only: mask only the last item of each sequence (fine-tuning, UPRec section 3.5).
        probability: chance of each item otherwise; one item is forced where none was drawn.
        replace_probability, random_probability: chance that a chosen item becomes [MASK] or a
            random item; otherwise it stays (BERT: 0.8 and 0.1).
    """

    last_only: bool = False
    probability: float = 0.2
    replace_probability: float = 1.0
    random_probability: float = 0.0

    def __call__(
        self, batch: JaggedBatch, model: UserModel, seed: int, step: int
    ) -> tuple[JaggedBatch, Tensor, Tensor]:
        """(masked batch, masked positions int64 [N] of [T], their items int64 [N])."""
        num_items, mask_id = model.num_items, model.token("mask")
        if self.last_only:
            return mask_last(batch, num_items=num_items, mask_id=mask_id)
        return mask_items(
            batch,
            seed=seed,
            step=step,
            probability=self.probability,
            replace_probability=self.replace_probability,
            random_probability=self.random_probability,
            num_items=num_items,
            mask_id=mask_id,
        )


class MaskedItemPrediction(nn.Module):
    """Mean over the masked positions of the batch of -log softmax(query(h_j) . E + b)[item_j]."""

    def forward(
        self, model: UserModel, states: Tensor, rows: Tensor, targets: Tensor, backend=None
    ) -> Tensor:
        """A scalar loss from states [T, D]; 0 with a live graph when nothing is masked."""
        return model.item_head.loss(
            states.index_select(0, rows), model.item_table, targets, backend=backend
        )
