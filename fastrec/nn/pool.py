"""From states to user vectors. Legend: B sequences, T events, V items, D width."""

from torch import Tensor

from fastrec.data.batch import JaggedBatch


def max_pool(states: Tensor, batch: JaggedBatch, num_items: int) -> Tensor:
    """[B, D]: the largest of each feature over the items of a sequence (UPRec, eq. 8).

    Special tokens do not count, so `batch` must be the one before items were masked. A sequence
    without items gives 0. Equal maxima share the gradient.
    """
    items = (batch.values < num_items).unsqueeze(1)
    segment = batch.segment_ids().unsqueeze(1).expand_as(states)
    lowest = float("-inf")
    pooled = states.new_full((len(batch), states.shape[1]), lowest).scatter_reduce(
        0, segment, states.masked_fill(~items, lowest), reduce="amax"
    )
    return pooled.masked_fill(pooled == lowest, 0.0)
