"""The input of an item: what stands for it before the encoder.

Legend: V items, S special tokens, T events, D width.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class ItemRows(NamedTuple):
    """Vectors of the events of a batch: rows `values` [T] of `table` [V + S, D], or `table` [T, D]
    itself where `values` is None. An encoder may gather the rows inside of its first op."""

    table: Tensor
    values: Tensor | None

    def dense(self) -> Tensor:
        """[T, D]."""
        return self.table if self.values is None else F.embedding(self.values, self.table)
