# SPDX-License-Identifier: Apache-2.0
"""Linear layers on user vectors, of the encoders of bags.

Legend: B sequences, H width of a layer.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.random import Rng, keep_mask


def check_widths(hidden: Sequence[int]) -> None:
    """Raise ValueError for widths of layers below 1."""
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden must be widths of at least 1, got {list(hidden)}")


def numbers_of(widths: Sequence[int]) -> int:
    """How many numbers `layers_of` has."""
    return sum((before + 1) * after for before, after in itertools.pairwise(widths))


def layers_of(widths: Sequence[int]) -> nn.ModuleList:
    """A linear layer from each width to the next."""
    return nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))


def dropped(x: Tensor, batch: JaggedBatch, p: float, rng: Rng | None, layer: int) -> Tensor:
    """Dropout of user vectors [B, H]: their key is that of the sequence, at row 0."""
    if rng is None or p == 0.0:
        return x
    zero = torch.zeros_like(batch.keys)
    keep, scale = keep_mask(rng, p, batch.keys, zero, x.shape[1], site="ffn_inner", layer=layer)
    return x * keep * scale
