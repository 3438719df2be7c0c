"""Corruptions of a jagged batch for pre-training and fine-tuning.

Each returns (corrupted batch, rows, targets): `rows` are positions in `values` whose items are to
be predicted, `targets` the items that stood there. The input batch is not changed. Letters:
B sequences, T events, N rows, V items (`num_items`); special tokens are the ids >= V.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.random import Rng, draws, threshold

_MAX_POSITIONS = 65536


def mask_items(
    batch: JaggedBatch,
    *,
    seed: Tensor | int,
    step: Tensor | int,
    probability: float,
    num_items: int,
    mask_id: int,
    force_one: bool = True,
    replace_probability: float = 1.0,
    random_probability: float = 0.0,
) -> tuple[JaggedBatch, Tensor, Tensor]:
    """Choose each item with `probability` and put `mask_id` in its place.

    Returns (masked batch, rows int64 [N] ascending, targets int64 [N]).

    Whether an event is chosen depends on (seed, step, key of the sequence, position there)
    only: a sequence has the same mask in any batch, in any order, on any device. The position
    counts special tokens, so a leading CLS shifts it. Special tokens are never chosen. With
    `force_one`, a sequence that holds items of which none was chosen gets one, drawn uniformly.

    A chosen item becomes `mask_id` with `replace_probability`, a random item of [0, V) with
    `random_probability`, and stays as it is otherwise; BERT's 80/10/10 is 0.8 and 0.1. Every chosen
    position is predicted. Probabilities are rounded to 2^-16; a random item has its probability
    1/V to within 2^-32, and may be the original one.

    On CUDA the only host synchronisation is the one that learns N.
    Raises ValueError for a probability out of range or sequences longer than 65,536.
    """
    if min(replace_probability, random_probability) < 0:
        raise ValueError("replace_probability and random_probability must not be negative")
    if replace_probability + random_probability > 1 + 1e-9:
        raise ValueError(
            "replace_probability + random_probability must be at most 1, got "
            f"{replace_probability} + {random_probability}"
        )
    if batch.max_seq_len > _MAX_POSITIONS:
        raise ValueError(f"sequences may hold {_MAX_POSITIONS} events, got {batch.max_seq_len}")
    segment, position = batch.segment_ids(), batch.positions()
    rng, keys = Rng(seed, step), batch.keys[segment]
    real = batch.values < num_items

    drawn = draws(rng, keys, 0, position, site="mask_item")
    chosen = (drawn < threshold(probability)) & real
    if force_one:
        rank = _running(real)  # number of items before each event, over the whole batch
        items = rank[batch.offsets]
        count = items.diff()
        empty = _running(chosen)[batch.offsets].diff() == 0
        pick = draws(rng, batch.keys, 0, torch.zeros_like(count), site="mask_forced")
        forced = items[:-1] + (pick * count >> 16)
        chosen |= real & empty[segment] & (rank[:-1] == forced[segment])

    rows = chosen.nonzero().squeeze(1)
    targets = batch.values[rows]
    if replace_probability == 1:
        masked = torch.where(chosen, mask_id, batch.values)
        return replace(batch, values=masked), rows, targets

    def draw(site: str, row: int = 0) -> Tensor:
        return draws(rng, keys[rows], row, position[rows], site=site)

    kind = draw("mask_replace")
    item = (draw("mask_random_item", 0) << 16 | draw("mask_random_item", 1)) * num_items >> 32
    swapped = kind < threshold(min(1.0, replace_probability + random_probability))
    now = torch.where(swapped, item, targets)
    now = torch.where(kind < threshold(replace_probability), mask_id, now)
    return replace(batch, values=batch.values.index_copy(0, rows, now)), rows, targets


def mask_last(
    batch: JaggedBatch, *, num_items: int, mask_id: int
) -> tuple[JaggedBatch, Tensor, Tensor]:
    """Put `mask_id` in the place of the last item of each sequence (special tokens do not count).

    Returns (masked batch, rows int64 [N] ascending, targets int64 [N]). A sequence without items
    gives no row, so N <= B. On CUDA the only host synchronisation is the one that learns N.
    """
    real = batch.values < num_items
    rank = _running(real)
    last = real & (rank[1:] == rank[batch.offsets[1:]][batch.segment_ids()])
    rows = last.nonzero().squeeze(1)
    masked = torch.where(last, mask_id, batch.values)
    return replace(batch, values=masked), rows, batch.values[rows]


def _running(flags: Tensor) -> Tensor:
    """int64 [T + 1]: number of set flags before each event; the last entry is the total."""
    counts = flags.new_zeros(flags.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=counts[1:])
    return counts
