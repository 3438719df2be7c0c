# SPDX-License-Identifier: Apache-2.0
"""The step `friend`: who is drawn, who is no negative, and the ranks of several processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import GRAPH, Known, lists_of, same, six_users
from plain_steps import MASK, RNG, assert_same_events

from fastrec.data.batch import JaggedBatch
from fastrec.data.graph import FriendSampler
from fastrec.data.side import Shard
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.one_of import OneOf
from fastrec.random import Rng


def social(profiles=None) -> Known:
    side = Known(six_users(), graph=GRAPH, profiles=profiles)
    side.user_columns["age"] = torch.arange(6) * 10.0
    return side


def six_of(view: int, users=(4, 0, 5, 1), rank=0, world_size=1, rng=RNG, profiles=None):
    """The arguments of the step for these users."""
    side = social(profiles)
    side.shard = Shard(np.array(users), rank, world_size, view)
    return side.gather(list(users[rank::world_size])).as_view(view), rng, side


@pytest.mark.parametrize("view", [0, 2])
@pytest.mark.parametrize("step_number", range(5))
def test_friend_adds_the_drawn_friends_with_their_columns(view, step_number):
    batch, rng, side = six_of(view, rng=Rng(3, step_number))
    made = Friend()(batch, rng, side)
    friends = {0: {1}, 1: {0, 2}, 2: {1}, 3: {4}, 4: {3}, 5: set()}
    sequences, pairs = made.sample_ids.tolist(), made.pairs
    assert sequences[:4] == [4, 0, 5, 1] and same(made.select(torch.arange(4)), batch)
    drawn = {}
    for query, place in zip(pairs.query_rows.tolist(), pairs.positive.tolist(), strict=True):
        drawn[sequences[query]] = sequences[pairs.candidate_rows[place]]
    assert sorted(drawn) == [0, 1, 4] and all(f in friends[u] for u, f in drawn.items())
    assert sequences[4:] == sorted(set(drawn.values()) - {4, 0, 5, 1})
    assert (made.keys >> 32 == view).all()
    inputs = [side.dataset.gather([user], "train").values.tolist() for user in sequences]
    assert lists_of(made) == inputs
    assert made.users["age"].tolist() == [10.0 * user for user in sequences]


def test_friends_are_drawn_from_all_of_them():
    seen = set()
    for step in range(20):
        made = Friend()(*six_of(0, users=(1,), rng=Rng(0, step)))
        seen.add(made.sample_ids.tolist()[1])
    assert seen == {0, 2}


def test_the_friends_of_a_view_are_masked_like_its_users():
    """The friend 3 of user 4 has the mask that he has as a user of that view."""
    batch, rng, side = six_of(2)
    both = Mask(0.5)(Friend()(batch, rng, side), rng, side)
    row = both.sample_ids.tolist().index(3)
    alone = Mask(0.5)(side.gather([3]).as_view(2), rng, side)
    assert lists_of(both)[row] == lists_of(alone)[0] and MASK not in lists_of(batch)[0]
    assert 20 in lists_of(alone)[0]


@pytest.mark.parametrize("hops", [0, 1, 2])
@pytest.mark.parametrize("same_profile", [True, False])
def test_friend_leaves_out_who_is_no_negative(hops, same_profile):
    profiles = np.array([0, 1, 0, 1, -1, 0])
    sampler = FriendSampler(GRAPH, hops, profiles if same_profile else None)
    for step in range(5):  # in one of them user 2 is drawn, two links away from user 0
        batch, rng, side = six_of(0, rng=Rng(3, step), profiles=profiles)
        pairs = Friend(hops, same_profile)(batch, rng, side).pairs
        _, expected = sampler.pairs_at(np.array([4, 0, 5, 1]), rng)
        assert all(torch.equal(a, b) for a, b in zip(pairs.exclude, expected.exclude, strict=True))
        assert pairs.negatives == expected.negatives
    if same_profile:
        assert pairs.query_profile.tolist() == [-1, 0, 1]
    else:
        assert pairs.query_profile is None


@pytest.mark.parametrize("users", [(4, 0, 5, 1), (3,), (2, 5)])
def test_the_ranks_hold_the_sequences_of_one_process(users):
    """Also a rank that has friends and no user."""
    whole = Friend()(*six_of(2, users))
    parts = [Friend()(*six_of(2, users, rank, 3)) for rank in range(3)]
    merged = JaggedBatch.cat(parts)
    order = merged.sample_ids.argsort()
    assert_same_events(
        merged.select(order), replace(whole, pairs=None).select(whole.sample_ids.argsort())
    )
    positives = sum(len(part.pairs.positive) for part in parts)
    assert positives == len(whole.pairs.positive)


def test_what_a_step_before_has_made_stays():
    batch, rng, side = six_of(0)
    batch.events["click"] = torch.arange(len(batch.values)) % 2
    batch.events["position"] = torch.arange(len(batch.values)) + 7
    made, events = Friend()(batch, rng, side), len(batch.values)
    for name in ("click", "position"):
        assert torch.equal(made.events[name][:events], batch.events[name])
    assert (made.events["click"][events:] == -1).all(), "of friends nothing is known"
    assert torch.equal(made.events["position"][events:], made.positions()[events:])


def test_one_of_keeps_who_belongs_to_whom():
    users, view = Friend()(*six_of(0)), OneOf([Crop(), Mask()])
    made = view(users, RNG, social())
    assert made.pairs is users.pairs and torch.equal(made.keys, users.keys)


def test_one_of_steps_that_add_sequences():
    step = OneOf([Friend(), Mask()])
    with pytest.raises(ValueError, match="one_of: a step that adds sequences"):
        step(*six_of(0))
