"""The input of an item: what stands for it before the encoder.

Legend: V items, S special tokens, T events, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import SPECIAL_TOKENS, JaggedBatch
from fastrec.nn.plain import embedding_table, is_plain


class ItemRows(NamedTuple):
    """Vectors of the events of a batch: rows `values` [T] of `table` [V + S, D], or `table` [T, D]
    itself where `values` is None. An encoder may gather the rows inside of its first op."""

    table: Tensor
    values: Tensor | None

    def dense(self) -> Tensor:
        """[T, D]."""
        return self.table if self.values is None else F.embedding(self.values, self.table)


@dataclass(frozen=True)
class Items:
    """What an item is to the encoder: the embedding of its id.

    Attributes:
        scale: multiply it by sqrt(D) (the original SASRec); the scores of items read it unscaled.
    """

    scale: bool = False


class ItemInput(nn.Module):
    """`ids` is the embedding table: items, then special tokens. Its first V rows score items."""

    def __init__(self, settings: Items, num_items: int, width: int):
        super().__init__()
        self.factor = width**0.5 if settings.scale else 1.0
        self.rows = num_items + len(SPECIAL_TOKENS)
        self.ids = nn.Embedding(self.rows, width)

    def forward(self, batch: JaggedBatch) -> ItemRows:
        if not is_plain(self.ids, nn.Embedding):
            return ItemRows(self.ids(batch.values) * self.factor, None)
        rows = ItemRows(self.ids.weight, batch.values)
        return rows if self.factor == 1.0 else ItemRows(rows.dense() * self.factor, None)

    @property
    def table(self) -> Tensor:
        """[V + S, D]: the vectors that score items, unscaled."""
        return embedding_table(self.ids, self.rows)
