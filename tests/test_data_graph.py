# SPDX-License-Identifier: Apache-2.0
"""The social graph: six users by hand, exclusions against sets, drawn friends, pairs over ranks."""

import itertools

import numpy as np
import pytest
import torch

from fastrec.data.graph import FriendSampler, SocialGraph
from fastrec.random import Rng

#   0 - 1 - 2 - 3    4 - 5    (6 has no friend)
PAIRS = np.array([[0, 1], [2, 1], [2, 3], [3, 2], [3, 3], [5, 4]])


@pytest.fixture
def graph() -> SocialGraph:
    return SocialGraph.from_pairs(PAIRS, 7)


def lists(values, offsets) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def random_graph(users: int, links: int, seed: int) -> SocialGraph:
    generator = np.random.default_rng(seed)
    ends = (users * generator.random((links, 2)) ** 3).astype(np.int64)  # a few hubs
    return SocialGraph.from_pairs(ends, users)


def friends_of(graph: SocialGraph) -> list[set]:
    return [set(part) for part in lists(graph.values, graph.offsets)]


def test_the_closure_is_symmetric_distinct_and_without_self(graph):
    assert lists(graph.values, graph.offsets) == [[1], [0, 2], [1, 3], [2], [5], [4], []]
    assert graph.degrees(np.array([1, 6])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("hops", "expected"),
    [
        # Queries 0, 1, 4 with positives 1, 2, 5; candidates 1, 2, 5, 3, 0, 2, 6.
        (0, [[0, 4], [0, 1, 5], [2]]),
        (1, [[0, 4], [0, 1, 4, 5], [2]]),
        (2, [[0, 1, 4, 5], [0, 1, 3, 4, 5], [2]]),
    ],
)
def test_exclusions_by_hand(graph, hops, expected):
    found = graph.exclusions([0, 1, 4], [1, 2, 5], [1, 2, 5, 3, 0, 2, 6], hops)
    assert lists(*found) == expected


@pytest.mark.parametrize("hops", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 700])
def test_exclusions_equal_the_definition_on_sets(monkeypatch, hops, block):
    monkeypatch.setattr("fastrec.data.graph._BLOCK", block)  # several blocks
    graph = random_graph(300, 700, seed=hops)
    friends = friends_of(graph)
    generator = np.random.default_rng(0)
    queries, candidates = generator.integers(300, size=50), generator.integers(300, size=130)
    rows, positives = graph.draw_friends(queries, Rng(0, 0))
    queries = queries[rows]
    candidates[:20] = positives[:20]
    reach = [{u} for u in range(300)]
    for _ in range(hops):
        reach = [set.union(near, *(friends[v] for v in near)) for near in reach]
    expected = [
        [j for j, c in enumerate(candidates) if c in reach[q] or c == p]
        for q, p in zip(queries, positives, strict=True)
    ]
    assert lists(*graph.exclusions(queries, positives, candidates, hops)) == expected


def test_exclusions_of_nothing(graph):
    values, offsets = graph.exclusions([], [], [1, 2])
    assert values.tolist() == [] and offsets.tolist() == [0]
    values, offsets = graph.exclusions([1, 2], [0, 1], [])
    assert values.tolist() == [] and offsets.tolist() == [0, 0, 0]
    lonely = SocialGraph.from_pairs(np.empty((0, 2)), 3)
    assert lists(*lonely.exclusions([0], [1], [2, 1, 0])) == [[1, 2]]


def test_drawn_friends_are_uniform_and_the_same_in_any_batch():
    graph = random_graph(300, 700, seed=5)
    friends = friends_of(graph)
    users = np.random.default_rng(1).permutation(300)
    rows, drawn = graph.draw_friends(users, Rng(3, 8))
    assert rows.tolist() == [i for i, user in enumerate(users) if friends[user]]
    assert all(f in friends[users[r]] for r, f in zip(rows, drawn, strict=True))
    by_user = dict(zip(users[rows].tolist(), drawn.tolist(), strict=True))
    part, again = graph.draw_friends(users[::-3], Rng(3, 8))
    assert [by_user[u] for u in users[::-3][part]] == again.tolist()
    assert drawn.tolist() != graph.draw_friends(users, Rng(3, 9))[1].tolist()
    assert drawn.tolist() != graph.draw_friends(users, Rng(4, 8))[1].tolist()

    hub = int(graph.degrees(np.arange(300)).argmax())
    counts = np.zeros(300)
    for step in range(400):
        counts[graph.draw_friends(np.array([hub]), Rng(0, step))[1]] += 1
    expected = 400 / len(friends[hub])
    observed = counts[sorted(friends[hub])]
    assert counts.sum() == observed.sum() == 400
    # Chi-squared: mean k, variance 2 k.
    freedom = len(friends[hub]) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_degree_beyond_one_draw_of_16_bits_reaches_every_friend():
    star = SocialGraph.from_pairs(np.stack((np.zeros(199_999), np.arange(1, 200_000)), 1), 200_000)
    drawn = [star.draw_friends(np.array([0]), Rng(0, step))[1][0] for step in range(300)]
    assert min(drawn) < 10_000 and max(drawn) > 190_000 and len(set(drawn)) > 290


def test_pairs_hold_every_user_once_and_the_drawn_friends(graph):
    users = np.array([6, 1, 4, 0])
    profile = np.array([0, 1, 0, 0, -1, 0, 0])
    sequences, pairs = FriendSampler(graph, hops=1, profile=profile).pairs_at(users, Rng(0, 0))
    rows, friends = graph.draw_friends(users, Rng(0, 0))
    assert rows.tolist() == [1, 2, 3]
    assert sequences[:4].tolist() == users.tolist()
    assert sorted(sequences[4:]) == sorted(set(friends) - set(users))
    assert sequences[pairs.query_rows].tolist() == [1, 4, 0]
    assert sequences[pairs.candidate_rows].tolist() == friends.tolist()
    assert pairs.positive.tolist() == [0, 1, 2]
    assert pairs.query_profile.tolist() == [1, -1, 0]
    assert pairs.candidate_profile.tolist() == profile[friends].tolist()
    allowed = np.ones((3, 3), dtype=bool)
    for i, listed in enumerate(lists(*pairs.exclude)):
        allowed[i, listed] = False
    allowed &= (profile[users[rows]][:, None] != profile[friends]) | (
        profile[users[rows]][:, None] < 0
    )
    assert pairs.negatives == allowed.sum() / 3  # the positives are listed


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_the_pairs_of_one_process(world_size):
    graph = random_graph(300, 700, seed=2)
    profile = np.random.default_rng(0).integers(-1, 5, size=300)
    sampler = FriendSampler(graph, profile=profile)
    users = np.random.default_rng(3).permutation(300)[:64]
    whole, one = sampler.pairs_at(users, Rng(1, 2))
    parts = [sampler.pairs_at(users, Rng(1, 2), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate([sequences for sequences, _ in parts])) == sorted(whole)
    candidates = np.concatenate([sequences[pairs.candidate_rows] for sequences, pairs in parts])
    assert parts[0][1].candidates_per_rank == tuple(len(p.candidate_rows) for _, p in parts)
    expected = {}
    for i, (query, listed) in enumerate(zip(one.query_rows, lists(*one.exclude), strict=True)):
        friend = whole[one.candidate_rows[one.positive[i]]]
        excluded = sorted(whole[one.candidate_rows.numpy()[listed]].tolist())
        expected[int(whole[query])] = (int(friend), excluded)
    found = {}
    for sequences, pairs in parts:
        assert torch.equal(pairs.candidate_profile, torch.from_numpy(profile[candidates]))
        for i, listed in enumerate(lists(*pairs.exclude)):
            user = int(sequences[pairs.query_rows[i]])
            assert profile[user] == pairs.query_profile[i]
            found[user] = (int(candidates[pairs.positive[i]]), sorted(candidates[listed].tolist()))
    assert found == expected


def test_errors_name_the_problem(graph):
    with pytest.raises(ValueError, match=r"pairs must be \[R, 2\], got \[3\]"):
        SocialGraph.from_pairs(np.arange(3), 7)
    with pytest.raises(ValueError, match=r"user 7 of a pair is out of \[0, 7\)"):
        SocialGraph.from_pairs(np.array([[0, 7]]), 7)
    for call in (lambda: graph.exclusions([0], [1], [1], 3), lambda: FriendSampler(graph, 3)):
        with pytest.raises(ValueError, match=r"hops must be one of \(0, 1, 2\), got 3"):
            call()
