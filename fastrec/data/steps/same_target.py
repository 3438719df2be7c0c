# SPDX-License-Identifier: Apache-2.0
"""Another training sequence that ends with the same item."""

from dataclasses import dataclass, replace

import numpy as np

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.random import Rng


@dataclass(frozen=True)
class SameTarget:
    """Put in the place of each sequence another training prefix that ends with the same item, drawn
    uniformly: the supervised positive of DuoRec (Qiu et al., 2022).

    A prefix is the training items of a user up to any of them but the first, the most recent ones
    of it as in every view; one that ends elsewhere in the user's own sequence counts as another.
    Where there is no other, and of a sequence of one item, the sequence stays. Keys and columns of
    users stay those of the user.

    The item that both end with is their target: `next_item` or `mask_last` behind this step hides
    it. First step of its view, because it reads the users' own sequences; raises ValueError where
    another one has changed them.
    """

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        dataset, room = side.dataset, side.shard.max_len
        ends = dataset.input_ends(batch.sample_ids, side.split)
        shift = np.repeat(ends - batch.offsets[1:].numpy(), batch.lengths.numpy())
        own = dataset.values[np.arange(len(batch.values)) + shift]
        added = set(batch.events) - set(side.event_columns)
        if added or not np.array_equal(own, batch.values.numpy()):
            raise ValueError(
                "same_target must be the first step of its view: the sequences are no longer those"
                " of their users"
            )
        starts, rows = ends - batch.lengths.numpy(), np.flatnonzero(batch.lengths.numpy() > 1)
        last = ends[rows] - 1
        last = side.target_index.draw(
            batch.sample_ids.numpy()[rows], last, dataset.values[last], batch.keys[rows], rng
        )
        ends[rows] = last + 1
        owner = np.searchsorted(dataset.offsets, last, side="right") - 1
        starts[rows] = dataset.offsets[owner]
        if room is not None:
            starts = np.maximum(starts, ends - room)
        made = dataset.between(batch.sample_ids, starts, ends, side.event_columns)
        return replace(made, keys=batch.keys, users=batch.users, pairs=batch.pairs, real=batch.real)
