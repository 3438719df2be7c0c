"""From states to user vectors. Legend: B sequences, T events, V items, D width."""

from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.ops.jagged_max_pool import jagged_max_pool


def max_pool(states: Tensor, batch: JaggedBatch, num_items: int) -> Tensor:
    """[B, D]: the largest of each feature over the items of a sequence (UPRec, eq. 8).

    Special tokens do not count, so `batch` must be the one before items were masked. A sequence
    without items gives 0. Of equal maxima the first one gets the gradient.
    """
    return jagged_max_pool(states, batch.offsets, mask=batch.values < num_items)
