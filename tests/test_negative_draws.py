# SPDX-License-Identifier: Apache-2.0
"""Negatives of the judges: bounded work, the law of sampling without replacement, and the same
draws in whatever company."""

import itertools

import numpy as np
import pytest
import torch
from builders import dataset_of

from fastrec.data.graph import SocialGraph
from fastrec.data.negatives import NegativeSampler
from fastrec.evaluation import friends
from fastrec.evaluation.candidates import sampled_negatives
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol


def head_and_tail(users: int = 2000, tail: int = 100) -> list[list[int]]:
    """Everybody has items 0 to 4; the others are bought once."""
    return [[0, 1, 2, 3, 4, *([5 + user] if user < tail else [])] for user in range(users)]


def test_a_head_that_everybody_has_costs_no_more(monkeypatch):
    """By rejection one draw in 1,000 is accepted here, and all items are wanted."""
    dataset = dataset_of(head_and_tail(20_000), 105)
    draws = []
    own = NegativeSampler.own
    monkeypatch.setattr(
        NegativeSampler, "own", lambda *given: draws.append(given[1] * len(given[3])) or own(*given)
    )
    negatives = sampled_negatives(dataset, torch.arange(200), 99, seed=0)
    assert 0 < sum(draws) <= 200 * 4 * 2 * 99
    for user, row in enumerate(negatives.tolist()):
        assert len(set(row)) == 99 and set(row) <= set(range(5, 105)) - {5 + user}


def successive(weights: dict[int, int], count: int) -> dict[tuple, float]:
    """Exact probabilities of ordered draws without replacement."""
    law = {}
    for order in itertools.permutations(weights, count):
        p, left = 1.0, sum(weights.values())
        for item in order:
            p *= weights[item] / left
            left -= weights[item]
        law[order] = p
    return law


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_the_law_is_that_of_draws_in_turn(rounds, monkeypatch):
    """Keys alone, keys after a round of rejection, rejection: the same probabilities."""
    monkeypatch.setattr("fastrec.evaluation.candidates._ROUNDS", rounds)
    weights, draws = {1: 1, 2: 2, 3: 4}, 6000
    sequences = [[0]] * draws + [[item] for item in weights for _ in range(1000 * weights[item])]
    drawn = sampled_negatives(dataset_of(sequences, 4), torch.arange(draws), 2, seed=0)
    seen: dict[tuple, int] = {}
    for order in map(tuple, drawn.tolist()):
        seen[order] = seen.get(order, 0) + 1
    law = successive(weights, 2)
    assert set(seen) == set(law)
    chi = sum((seen[order] - draws * p) ** 2 / (draws * p) for order, p in law.items())
    assert chi < 20.5, "0.1 % of six-sided tables are further off"


def test_negatives_are_a_function_of_seed_and_user():
    dataset = dataset_of(head_and_tail(300), 105)
    whole = sampled_negatives(dataset, torch.arange(300), 20, seed=3)
    for user in (0, 17, 299):
        alone = sampled_negatives(dataset, torch.tensor([user]), 20, seed=3)
        assert torch.equal(alone[0], whole[user])
    assert not torch.equal(sampled_negatives(dataset, torch.arange(300), 20, seed=4), whole)


def test_too_few_items_name_the_flag():
    dataset = dataset_of([[0, 1, 2], [3, 4, 5]], 9)
    message = r"user number 1, from 0, has 3 unseen items.*lower evaluation\.negatives"
    with pytest.raises(ValueError, match=message):
        sampled_negatives(dataset, torch.tensor([1]), 4, seed=0)


def test_a_popularity_ranker_falls_to_chance():
    generator = np.random.default_rng(0)
    p = 1 / np.arange(100, 20100)  # flat enough that 99 draws do not exhaust the head
    items = generator.choice(20000, size=(2000, 6), p=p / p.sum())
    judge = NextItemJudge(
        dataset_of(items.tolist(), 20000), torch.arange(2000), "test", Protocol("sampled")
    )
    assert 0.07 < ranking_metrics(judge.popularity_ranks())["HR@10"] < 0.13


def test_friend_negatives_are_drawn_from_all_others(monkeypatch):
    """As from a list of the users that are left, which nobody writes."""
    dataset = dataset_of([[0]] * 40, 1)
    pairs = np.array([[u, v] for u in range(0, 40, 3) for v in range(u + 1, 40, 5)])
    graph = SocialGraph.from_pairs(pairs, 40)
    monkeypatch.setattr(friends.SocialGraph, "from_dataset", classmethod(lambda cls, *_: graph))
    judge = friends.FriendsJudge(dataset, torch.arange(40), "train", negatives=9, seed=5)
    for query, row in zip(judge.queries.tolist(), judge.candidates.tolist(), strict=True):
        refused = [*graph.values[graph.offsets[query] : graph.offsets[query + 1]], query]
        left = np.delete(np.arange(40), refused)
        draw = np.random.Generator(np.random.Philox(key=(5, query * 40 + row[0])))
        assert row[1:] == draw.choice(left, 9, replace=False).tolist()
    with pytest.raises(ValueError, match=r"--evaluation\.friend_negatives"):
        friends.FriendsJudge(dataset, torch.arange(40), "train", negatives=39)
