# SPDX-License-Identifier: Apache-2.0
"""Metrics by hand, ranks against a full sort, protocols against their definition."""

import math

import numpy as np
import pytest
import torch
from builders import dataset_of, model_of

from fastrec.evaluation.candidates import sampled_negatives
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.next_item import NextItemJudge, evaluate
from fastrec.evaluation.protocol import Protocol
from fastrec.evaluation.ranking import rank_candidates


def test_metrics_by_hand():
    metrics = ranking_metrics(torch.tensor([1.0, 3.0, 10.0, 11.0]))
    assert metrics["HR@1"] == 0.25 and metrics["HR@5"] == 0.5 and metrics["HR@10"] == 0.75
    assert metrics["NDCG@5"] == pytest.approx((1 + 1 / 2) / 4)
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 4)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 4)


@pytest.mark.parametrize("ranks", [[], [0.5], [float("nan")]])
def test_metrics_reject_what_is_no_rank(ranks):
    with pytest.raises(ValueError, match="no user|ranks must be"):
        ranking_metrics(torch.tensor(ranks))


def test_candidates_share_ties():
    table = torch.tensor([[1.0], [1.0], [2.0], [0.0]])
    query, bias = torch.ones(1, 1), torch.zeros(4)
    assert rank_candidates(query, table, bias, torch.tensor([[0, 1, 2, 3]])).tolist() == [2.5]


@pytest.mark.parametrize("number", [2, 3, 10, 31, 91, 100])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_equal_candidates_tie_whatever_their_number(number, width):
    """A batched product summed the last of them in another order, to other bits."""
    table = torch.randn(1, width).expand(200, width).contiguous()
    candidates = torch.randint(200, (300, number))
    ranks = rank_candidates(torch.randn(300, width), table, torch.zeros(200), candidates)
    assert ranks.tolist() == [(number + 1) / 2] * 300


@pytest.mark.parametrize("seen", ["none", "exclude"])
def test_full_ranks_equal_a_stable_sort(seen):
    dataset = dataset_of([[5, 1, 1, 9], [20, 3, 20], [7, 7, 7], [0, 52, 30, 5], [2, 51, 52]], 53)
    users = torch.tensor([3, 0, 4, 1, 2])
    judge = NextItemJudge(dataset, users, "test", Protocol(candidates="full", seen=seen))
    query, table, bias = torch.randn(5, 4), torch.randn(53, 4), torch.randn(53)
    table[20], bias[20] = table[5], bias[5]  # equal items: the smaller id is ahead
    ranks = torch.cat(
        [judge._rank(query[:2], table, bias, slice(0, 2)),
         judge._rank(query[2:], table, bias, slice(2, 5))]
    )  # fmt: skip
    scores = query.double() @ table.double().T + bias.double()
    scores[:, 20] = scores[:, 5]
    for n, user in enumerate(users.tolist()):
        sequence = dataset.values[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        target, items = sequence[-1], list(range(53))
        if seen == "exclude":
            items = [item for item in items if item == target or item not in sequence[:-1]]
        items.sort(key=lambda item: (-scores[n, item].item(), item))
        assert ranks[n] == 1 + items.index(target)


@pytest.mark.parametrize("candidates", ["sampled", "full"])
def test_logit_adjustment_takes_popularity_from_the_scores(candidates):
    """A model that scores by popularity ranks at random with tau = 1: all scores are equal."""
    sequences = [[item, item, item, 0, item] for item in (1, 2, 3, 3, 2)]
    dataset, users = dataset_of(sequences, 5), torch.arange(5)
    model = model_of(num_items=5, width=4, max_len=5)
    counts = dataset.item_counts("train").double().clamp_min(1)
    assert counts.tolist() == [1, 3, 6, 6, 1]
    with torch.no_grad():
        model.item_embedding.weight.zero_()
        model.item_head.bias.copy_(counts.log())
    negatives = 2 if candidates == "sampled" else None
    plain, half, whole = (
        NextItemJudge(
            dataset, users, "valid", Protocol(candidates, negatives, logit_adjustment=tau)
        ).ranks(model)
        for tau in (0.0, 0.5, 1.0)
    )
    assert plain.equal(half) and not plain.equal(whole)
    # Equal scores: shared by the sampled candidates, in item order in the catalogue.
    assert whole.unique().tolist() == ([2.0] if candidates == "sampled" else [1.0])
    with pytest.raises(ValueError, match="logit_adjustment must be finite, got nan"):
        NextItemJudge(dataset, users, "valid", Protocol(logit_adjustment=float("nan")))


def test_nan_target_ranks_last():
    query, table = torch.tensor([[float("nan")]]), torch.ones(4, 1)
    assert rank_candidates(query, table, torch.zeros(4), torch.tensor([[2, 1]])).tolist() == [2]


@pytest.mark.parametrize(
    ("name", "message"),
    [("item_head.norm.weight", "states of the model"), ("item_embedding.weight", "item vectors")],
)
def test_a_model_that_is_not_finite_has_no_metrics(name, message):
    model = model_of(num_items=5, width=4, max_len=5, causal=True)
    with torch.no_grad():
        # Of the table: a row that no input reads.
        model.get_parameter(name)[-1 if name.startswith("item_head") else 4] = float("nan")
    dataset = dataset_of([[0, 1, 2, 3], [1, 2, 3, 0]], 5)
    with pytest.raises(ValueError, match=f"{message}.* are not finite"):
        evaluate(model, dataset, Protocol(), "valid")


def test_popularity_negatives_are_unseen_distinct_and_popular():
    # Item 0 holds a third of the interactions; user 3 has seen it.
    sequences = [[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8]] + [[0, 9, 10 + i] for i in range(20)]
    sequences.append([31, 32, 33])
    dataset = dataset_of(sequences, 40)
    users = torch.tensor([3, 24])
    negatives = sampled_negatives(dataset, users, 5, seed=1)
    assert negatives.shape == (2, 5)
    for user, row in zip(users.tolist(), negatives.tolist(), strict=True):
        assert len(set(row)) == 5 and not set(row) & set(sequences[user])
        assert max(row) < 34  # items 34..39 have no interaction
    counts = np.zeros(40)
    for seed in range(400):
        counts[sampled_negatives(dataset, users[1:], 1, seed).numpy()] += 1
    # p(item 0) = 24 of the 72 interactions with items that user 24 has not seen.
    assert abs(counts[0] / 400 - 24 / 72) < 4 * math.sqrt(2 / 9 / 400)
    alone = sampled_negatives(dataset, users[1:], 5, seed=1)
    assert torch.equal(alone[0], negatives[1])  # a function of (seed, user)
    with pytest.raises(
        ValueError, match="user number 3, from 0, has 30 unseen items, 32 negatives"
    ):
        sampled_negatives(dataset, users, 32, seed=1)


def test_popularity_ranker_falls_to_chance_on_sampled_negatives():
    """The self-test of the protocol: sampled HR@10 of 100 candidates is near 0.10."""
    generator = np.random.default_rng(0)
    # Flat enough that 99 draws without replacement do not exhaust the head.
    p = 1 / np.arange(100, 20100)
    items = generator.choice(20000, size=(3000, 6), p=p / p.sum())
    dataset = dataset_of(items.tolist(), 20000)
    users = torch.arange(3000)
    sampled = NextItemJudge(
        dataset, users, "test", Protocol("sampled", negatives=99)
    ).popularity_ranks()
    assert 0.07 < ranking_metrics(sampled)["HR@10"] < 0.13
    full = NextItemJudge(dataset, users, "test", Protocol(candidates="full")).popularity_ranks()
    assert ranking_metrics(full)["HR@10"] > 0.005


def test_a_model_is_asked_as_it_was_trained():
    """Ranks of a model, causal or not, from its own inputs; a model that counts on a target that it
    was shown would rank it first."""
    sequences = [[1, 2, 3, 4, 5], [3, 1, 4], [5, 9, 2, 6, 5, 3, 5], [8, 9, 7]]
    dataset, users = dataset_of(sequences, 10), torch.arange(4)
    for causal in (False, True):
        model = model_of(num_items=10, causal=causal, max_len=4)
        judge = NextItemJudge(dataset, users, "test", Protocol())
        for user, sequence in enumerate(sequences):
            history = sequence[:-1][-4 if causal else -3 :]
            batch = model.inputs_of([history], ask=True)
            assert batch.values.tolist() == history + [10] * (not causal)
            state = model.encode(batch).states[-1:]
            scores = (model.item_head.query(state) @ model.item_table.T + model.item_head.bias)[0]
            expected = 1 + int((scores > scores[sequence[-1]]).sum())
            assert judge.rank_rows(model, slice(user, user + 1)).tolist() == [expected]


def test_a_validation_scores_by_the_vectors_of_now():
    """Those of cosines are computed: they are kept within one, and made anew for the next."""
    data = dataset_of([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 5, 2]], 10)
    model = model_of(num_items=10, head_similarity="cosine")
    judge, rows = NextItemJudge(data, torch.arange(3), "test"), slice(0, 3)
    before = judge.score(model, None, rows)
    judge.metrics(before)
    with torch.no_grad():
        model.item_embedding.weight[5:].normal_(std=9.0)
    after = NextItemJudge(data, torch.arange(3), "test").score(model, None, rows)
    assert torch.equal(judge.score(model, None, rows), after) and not torch.equal(before, after)


def test_a_key_without_effect_is_an_error():
    for settings, message in (
        (dict(negatives=9), "evaluation.negatives has no effect: candidates is full"),
        (dict(candidates="sampled", seen="exclude"), "evaluation.seen has no effect: sampled"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol(**settings)
    with pytest.raises(ValueError, match="friend_negatives has no effect: no stage judges friends"):
        Protocol(friend_negatives=9).check_used({"next_item", "attributes"})
    with pytest.raises(ValueError, match="evaluation.seed has no effect: candidates is full"):
        Protocol(seed=1).check_used({"next_item"})
    with pytest.raises(
        ValueError, match="logit_adjustment has no effect: no stage ranks all items"
    ):
        Protocol(logit_adjustment=1.0).check_used({"click"})
    for used in (Protocol("sampled", seed=1), Protocol(friend_negatives=9, seed=1)):
        used.check_used({"next_item", "friends"})
