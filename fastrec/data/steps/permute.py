# SPDX-License-Identifier: Apache-2.0
"""Items in a random order, each with the position that it had."""

from dataclasses import dataclass, replace

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.random import Rng, wide_draws


@dataclass(frozen=True)
class Permute:
    """Shuffle the items of each sequence and let every event predict the one behind it in the new
    order; the encoder sees the position that an item had (permuted item prediction of IDA-SR, Mu
    et al., 2022). The column `position` holds it."""

    asks = "last"
    before = ("mask", "last")
    moves = True  # only an encoder that reads positions can tell

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        owner, position = batch.segment_ids(), batch.positions()
        key = wide_draws(rng, batch.keys[owner], position, site="permute")
        index = (owner << 33 | key).argsort(stable=True)
        batch = replace(batch, events={**batch.events, "position": position})
        return NextItem()(batch.with_events(index, batch.offsets, batch.max_seq_len), rng, side)
