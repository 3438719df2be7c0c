# SPDX-License-Identifier: Apache-2.0
"""Social relation detection over 2 and 3 gloo processes: every rank sees the friends of all."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastrec.data.graph import FriendSampler, SocialGraph
from fastrec.objectives.friends import SocialRelationDetection
from fastrec.objectives.joint import Term, of_all_ranks, total_loss
from fastrec.random import Rng

USERS, WIDTH = 12, 5


def sampler(profiles: bool) -> FriendSampler:
    links = np.random.default_rng(0).integers(USERS + 4, size=(20, 2))
    links = links[links[:, 0] != links[:, 1]]
    profile = np.arange(USERS + 4) % 5 - 1 if profiles else None
    return FriendSampler(SocialGraph.from_pairs(links, USERS + 4), hops=1, profile=profile)


def losses(group, profiles=True, emptied=()):
    """(loss of all ranks, gradient of the user vectors, gradient of w), averaged like DDP does."""
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    sequences, pairs = sampler(profiles).pairs_at(np.arange(USERS), Rng(0, 0), rank, world)
    torch.manual_seed(0)
    vectors = torch.randn(USERS + 4, WIDTH, requires_grad=True)
    head = SocialRelationDetection(WIDTH, initial=0.4)
    there = torch.from_numpy(~np.isin(sequences, emptied))
    if there.all():  # nobody of this rank is emptied
        there = None
    loss, count = head.loss(vectors[torch.from_numpy(sequences)], pairs, there)
    total = total_loss(of_all_ranks([Term("friends", 1.0, loss, count)], world))
    total.backward()
    found = [total.detach(), vectors.grad, head.weight.grad]
    if group is not None:
        for value in found:
            dist.all_reduce(value)
    return [value / world for value in found]


CASES = ((True, ()), (False, ()), (True, (2,)), (False, (2, 5, USERS + 1)))


def each(group):
    return [losses(group, *case) for case in CASES]


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_are_one_process(ranks, world):
    for found in ranks(world, each):
        for got, case in zip(found, CASES, strict=True):
            for value, expected in zip(got, losses(None, *case), strict=True):
                torch.testing.assert_close(value, expected)


def test_the_exclusions_and_the_sizes_of_the_ranks_matter():
    counts = sampler(True).pairs_at(np.arange(USERS), Rng(0, 0), 0, 3)[1].candidates_per_rank
    assert len(set(counts)) > 1 and min(counts) > 0
    assert len({losses(None, *case)[0].item() for case in CASES}) == len(CASES)


def shares(group):
    """Losses of 1 behind `of_all_ranks`, where one rank or none has things to count."""
    mine = int(dist.get_rank(group) == 0)
    one = torch.tensor(1.0)
    terms = [
        Term("nobody", 1.0, one, 0),
        Term("first", 1.0, one, torch.tensor(mine)),
        Term("seen", 1.0, one, None),
    ]
    return [term.loss.item() for term in of_all_ranks(terms, dist.get_world_size(group))]


def test_a_rank_without_things_to_count_has_no_share(ranks):
    assert ranks(2, shares) == [[0, 2, 1], [0, 0, 1]]
