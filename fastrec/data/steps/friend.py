# SPDX-License-Identifier: Apache-2.0
"""One drawn friend of each user joins the batch."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastrec.data.batch import JaggedBatch
from fastrec.data.graph import FriendSampler
from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.random import Rng


@dataclass(frozen=True)
class Friend:
    """Add the sequences of drawn friends who are not in the batch, and who is a negative of whom
    (UPRec, section 3.3.3): later steps and all objectives of the view see friends like users.

    Attributes:
        hops: candidates that are no negatives of a user: 1 friends, 2 friends of friends as well,
            0 neither.
        same_profile: nor are users with the same values in all discrete attributes.
    """

    hops: Literal[0, 1, 2] = 2
    same_profile: bool = True

    def __post_init__(self):
        check_fields(self)

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        users, rank, world_size, view, max_len = side.shard
        sampler = FriendSampler(
            side.graph, self.hops, side.profile_ids if self.same_profile else None
        )
        sequences, pairs = sampler.pairs_at(users, rng, rank, world_size)
        friends = side.gather(torch.from_numpy(sequences[len(batch) :]), max_len)
        return replace(JaggedBatch.cat([batch, friends.as_view(view)]), pairs=pairs)
