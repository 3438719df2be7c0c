# SPDX-License-Identifier: Apache-2.0
"""RecBole's masking of items, without loops over them.

The same distribution as `MaskItemSequence`, and other draws: those of torch's generator, not of
Python's. Legend: B sequences of padded length L, M the masks that RecBole keeps of a sequence.
"""

import functools
import random
from collections.abc import Callable

import torch
from recbole.data.interaction import Interaction
from recbole.data.transform import MaskItemSequence
from torch import Tensor

from fastrec.integrations.patching import Replacement, keep_original, own_method


def replacements() -> list[Replacement]:
    return [Replacement(MaskItemSequence, "__call__", _call())]


def _call() -> Callable:
    original = MaskItemSequence.__call__

    @functools.wraps(original)
    def __call__(self, dataset, interaction):
        if why := _unserved(self):
            keep_original(type(self).__qualname__, why)
            return original(self, dataset, interaction)
        items = interaction[self.ITEM_SEQ]
        if random.random() < self.ft_ratio:  # the coin of the original, one for a batch
            last = interaction[self.ITEM_SEQ_LEN][:, None] - 1
            masked = torch.zeros_like(items, dtype=torch.bool).scatter(1, last, True)
        else:
            draws = torch.rand(items.shape, device=items.device)
            masked = (draws < self.mask_ratio) & (items != 0)
        columns = mask_items(items, masked, self.mask_item_length, dataset.num(self.ITEM_ID))
        names = (self.MASK_ITEM_SEQ, self.POS_ITEMS, self.NEG_ITEMS, self.MASK_INDEX)
        interaction.update(Interaction(dict(zip(names, columns, strict=True))))
        return interaction

    return __call__


def _unserved(transform: MaskItemSequence) -> str | None:
    names = ("_append_mask_last", "_neg_sample", "_padding_sequence")
    if why := own_method(transform, MaskItemSequence, names):
        return why
    if transform.mask_item_length < 1:
        return f"mask_ratio {transform.mask_ratio} keeps no mask of a sequence"
    return None


def mask_items(items: Tensor, masked: Tensor, kept: int, num_items: int) -> tuple[Tensor, ...]:
    """(item_seq [B, L] with the token `num_items` where masked; of the last `kept` masks, to the
    right of zeros: the items [B, M], items that are not in the sequence [B, M], places [B, M])."""
    behind = masked.flip(1).cumsum(1).flip(1)  # masks at or behind each place
    row, place = (masked & (behind <= kept)).nonzero(as_tuple=True)
    column = kept - behind[row, place]
    positives, negatives, places = (items.new_zeros(items.shape[0], kept) for _ in range(3))
    positives[row, column] = items[row, place]
    places[row, column] = place
    drawn = torch.randint(1, num_items, row.shape, device=items.device)
    while len(again := (items[row] == drawn[:, None]).any(1).nonzero()[:, 0]):
        drawn[again] = torch.randint(1, num_items, again.shape, device=items.device)
    negatives[row, column] = drawn
    return items.masked_fill(masked, num_items), positives, negatives, places
