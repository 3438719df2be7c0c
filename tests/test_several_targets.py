# SPDX-License-Identifier: Apache-2.0
"""Several targets a user: metrics and ranks against plain loops over users and sorted lists."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import dataset_of, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import needs_proc, peak_of

from fastrec.data.batch import offsets_of
from fastrec.evaluation import next_item
from fastrec.evaluation.candidates import sampled_negatives
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.next_item import NextItemJudge, evaluate
from fastrec.evaluation.protocol import Protocol
from fastrec.evaluation.ranking import others_above

V = 23
SEQUENCES = [[5, 1, 1, 9, 4, 2, 8, 1], [20, 3, 20], [7, 6, 7, 6], [0, 22, 21, 5]]
SPLITS = [[3, 5], [2, 3], [1, 2], [2, 2]]


def split_dataset(sequences=SEQUENCES, splits=SPLITS, num_items=V):
    return replace(dataset_of(sequences, num_items), splits=np.array(splits, dtype=np.int64))


def plain_metrics(ranks_of_users, k):
    """One user at a time, by the formulas of the docstring."""
    found = {name: [] for name in ("HR", "Recall", "NDCG", "MRR@k", "MAP", "MRR")}
    for ranks in map(sorted, ranks_of_users):
        hits = [rank for rank in ranks if rank <= k]
        most = min(k, len(ranks))
        ideal = sum(1 / math.log2(place + 1) for place in range(1, most + 1))
        found["HR"].append(float(bool(hits)))
        found["Recall"].append(len(hits) / len(ranks))
        found["NDCG"].append(sum(1 / math.log2(rank + 1) for rank in hits) / ideal)
        found["MRR@k"].append(1 / hits[0] if hits else 0.0)
        found["MAP"].append(sum(i / rank for i, rank in enumerate(hits, 1)) / most)
        found["MRR"].append(1 / ranks[0])
    return {name: sum(values) / len(values) for name, values in found.items()}


LISTS = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True), min_size=1, max_size=7
)


@settings(deadline=None, max_examples=200)
@given(users=LISTS, k=st.integers(2, 12), data=st.data())
def test_metrics_against_one_user_at_a_time(users, k, data):
    pairs = [(rank, user) for user, ranks in enumerate(users) for rank in ranks]
    pairs = data.draw(st.permutations(pairs))
    ranks = torch.tensor([rank for rank, _ in pairs], dtype=torch.float64)
    owner = torch.tensor([user for _, user in pairs])
    found, expected = ranking_metrics(ranks, (k,), owner), plain_metrics(users, k)
    names = {"HR": f"HR@{k}", "NDCG": f"NDCG@{k}", "MRR@k": f"MRR@{k}", "MRR": "MRR"}
    if any(len(each) > 1 for each in users):
        names |= {"Recall": f"Recall@{k}", "MAP": f"MAP@{k}"}
    assert set(found) == set(names.values())
    for name, printed in names.items():
        assert found[printed] == pytest.approx(expected[name], abs=1e-12), name
    assert all(0 <= value <= 1 + 1e-12 for value in found.values())


def test_one_target_a_user_gives_the_numbers_of_ranks_alone():
    ranks = torch.randint(1, 40, (500,), generator=torch.Generator().manual_seed(0)).double()
    plain = ranking_metrics(ranks)
    assert list(plain) == ["HR@1", "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR@10", "MRR"]
    assert ranking_metrics(ranks, owner=torch.arange(500)) == plain
    several = ranking_metrics(torch.cat([ranks, ranks]), owner=torch.arange(500).repeat(2))
    assert list(several) == [
        "HR@1", "Recall@1", "HR@5", "Recall@5", "NDCG@5", "HR@10", "Recall@10", "NDCG@10",
        "MRR@10", "MAP@10", "MRR",
    ]  # fmt: skip
    assert several["HR@10"] == several["Recall@10"] == plain["HR@10"]


def parts(user, split):
    """(input, distinct targets in their order) of a user."""
    train, valid = SPLITS[user]
    sequence = SEQUENCES[user]
    if split == "valid":
        return sequence[:train], list(dict.fromkeys(sequence[train:valid]))
    return sequence[:valid], list(dict.fromkeys(sequence[valid:]))


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("seen", ["none", "exclude", "zero"])
@pytest.mark.parametrize("seed", range(4))
def test_full_ranks_are_places_in_one_sorted_list_of_each_user(seen, split, seed):
    """Also where a target was seen before: of users 0 and 2 in test, of user 1 in validation."""
    torch.manual_seed(seed)
    dataset = split_dataset()
    users = torch.from_numpy(dataset.users(split))
    assert users.tolist() == ([0, 1, 2] if split == "valid" else [0, 2, 3])
    judge = NextItemJudge(dataset, users, split, Protocol(seen=seen))
    query, table = torch.randint(-2, 3, (3, 3)).float(), torch.randint(-2, 3, (V, 3)).float()
    bias = torch.zeros(V)
    ranks = torch.cat(
        [judge._rank(query[:1], table, bias, slice(0, 1)),
         judge._rank(query[1:], table, bias, slice(1, 3))]
    )  # fmt: skip
    expected, pairs = [], []
    for place, user in enumerate(users.tolist()):
        history, targets = parts(user, split)
        scores, items = table @ query[place], list(range(V))
        if seen == "zero":
            scores[history] = 0
        if seen == "exclude":
            items = [item for item in items if item in targets or item not in history]
        items.sort(key=lambda item: (-scores[item].item(), item))
        expected += [1 + items.index(target) for target in targets]
        pairs += [(place, target) for target in targets]
    assert list(zip(judge.owner.tolist(), judge.targets.tolist(), strict=True)) == pairs
    assert ranks.tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_sampled_ranks_are_places_among_negatives_and_the_other_targets(seed):
    torch.manual_seed(seed)
    dataset, protocol = split_dataset(), Protocol("sampled", negatives=5, negatives_by="uniform")
    users = torch.tensor([2, 3, 0])
    judge = NextItemJudge(dataset, users, "test", protocol)
    assert judge.candidates().shape == (2 + 2 + 3, 1 + 5)
    query, table = torch.randint(-2, 3, (3, 2)).float(), torch.randint(-2, 3, (V, 2)).float()
    ranks = judge._rank(query, table, torch.zeros(V), slice(0, 3))
    negatives = sampled_negatives(dataset, users, 5, 0, by="uniform").tolist()
    expected = []
    for place, user in enumerate(users.tolist()):
        targets = parts(user, "test")[1]
        scores = table @ query[place]
        for target in targets:
            others = scores[[item for item in targets if item != target] + negatives[place]]
            expected.append(
                1 + (others > scores[target]).sum() + (others == scores[target]).sum() / 2
            )
    assert ranks.tolist() == [float(rank) for rank in expected]
    lost = judge._rank(query * float("nan"), table, torch.zeros(V), slice(0, 3))
    assert lost.tolist() == [7, 7, 7, 7, 8, 8, 8]


def test_a_model_is_ranked_and_averaged_over_users():
    dataset = split_dataset()
    model = model_of(num_items=V, width=4, max_len=5)
    judge = NextItemJudge(dataset, torch.tensor([0, 2, 3]), "test", Protocol(cutoffs=[4]))
    ranks = judge.ranks(model)
    assert torch.equal(
        ranks, torch.cat([judge.rank_rows(model, slice(i, i + 1)) for i in range(3)])
    )
    users = [ranks[a:b].tolist() for a, b in ((0, 3), (3, 5), (5, 7))]
    found, expected = judge.metrics(ranks), plain_metrics(users, 4)
    assert list(found) == judge.metric_names
    assert found["NDCG@4"] == pytest.approx(expected["NDCG"])
    assert found["MAP@4"] == pytest.approx(expected["MAP"])
    assert evaluate(model, dataset, Protocol(cutoffs=[4])) == found
    group = judge.metrics(ranks, users=torch.tensor([False, True, True]))
    assert group["Recall@4"] == pytest.approx(plain_metrics(users[1:], 4)["Recall"])
    assert judge.lists(model, 4).shape == (3, 4) and len(judge.popularity_ranks()) == 7


@pytest.mark.parametrize("seen", ["none", "exclude", "zero"])
def test_many_targets_are_ranked_block_by_block(seen):
    """700 targets of two users are more than a block of pairs holds."""
    torch.manual_seed(0)
    history, rest = list(range(0, 900, 3)), list(range(900))
    sequences = [history + rest[:400], history + rest[300:600]]
    dataset = split_dataset(sequences, [[299, 300]] * 2, 900)
    judge = NextItemJudge(dataset, torch.arange(2), "test", Protocol(seen=seen))
    query, table = torch.randn(2, 4), torch.randn(900, 4)
    ranks = judge._rank(query, table, torch.zeros(900), slice(0, 2))
    expected = []
    for user, targets in enumerate((rest[:400], rest[300:600])):
        scores = table @ query[user]
        if seen == "zero":
            scores[history] = 0
        items = [i for i in rest if seen != "exclude" or i in targets or i % 3]
        items.sort(key=lambda item: (-scores[item].item(), item))
        expected += [1 + items.index(target) for target in targets]
    assert ranks.tolist() == expected


def test_users_without_a_target_or_an_input_are_not_ranked():
    """User 0 has training events alone, user 1 none before its validation, user 2 all parts."""
    dataset = split_dataset([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[3, 3], [0, 2], [1, 2]])
    assert dataset.users("train").tolist() == [0, 2]
    assert dataset.users("valid").tolist() == [2] and dataset.users("test").tolist() == [1, 2]
    with pytest.raises(ValueError, match="user 1 has no target, or no event before it, and is not"):
        NextItemJudge(dataset, torch.tensor([1]), "valid")
    with pytest.raises(ValueError, match="there is no user to evaluate in split 'valid'"):
        NextItemJudge(dataset, torch.tensor([], dtype=torch.int64), "valid")


def test_groups_of_users_have_the_metrics_of_all():
    """Also where nobody in a group has several targets."""
    model, data = model_of(num_items=V), split_dataset()
    judge = NextItemJudge(data, data.users("valid"), "valid")
    ranks, several = judge.ranks(model), judge.owner.bincount() > 1
    assert several.any() and not several.all()
    whole = judge.metrics(ranks)
    assert any(name.startswith("Recall") for name in whole)
    for chosen in (several, ~several):
        assert list(judge.metrics(ranks, users=chosen)) == list(whole)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_places_among_the_other_targets_against_one_pair_at_a_time(data):
    number = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, math.nan])
    scores = [data.draw(values) for _ in range(sum(number))]
    offsets, expected = np.cumsum([0, *number]), []
    for start, end in pairwise(offsets.tolist()):
        for own in scores[start:end]:
            above = sum((x > own) + (x == own) / 2 for x in scores[start:end]) - 0.5
            expected.append(1.0 + (end - start - 1 if math.isnan(own) else above))
    ranks = torch.ones(len(scores), dtype=torch.float64)
    found = others_above(ranks, torch.tensor(scores), torch.from_numpy(offsets))
    assert found.tolist() == expected


@needs_proc
def test_one_heavy_user_costs_no_table():
    number = torch.full((512,), 2)
    number[0] = 100_000
    scores, offsets = torch.randn(int(number.sum())), offsets_of(number)
    ranks = torch.ones(len(scores), dtype=torch.float64)
    others_above(ranks[:2], scores[:2], offsets_of(torch.tensor([2])))
    assert peak_of(lambda: others_above(ranks, scores, offsets)) < 100 * scores.nbytes


@pytest.mark.parametrize(
    "users", [[True, False, True], [0.0, 1.5], np.ones(2, dtype=bool)], ids=str
)
def test_users_are_numbers_and_no_mask(users):
    data = split_dataset()
    with pytest.raises(TypeError, match="users must be whole numbers, places in the data set, got"):
        evaluate(model_of(num_items=V), data, users=users)
    with pytest.raises(TypeError, match="users must be whole numbers"):
        data.gather(users, "all")
    assert len(data.gather([], "all")) == 0


@pytest.mark.parametrize("seen", ["exclude", "none"])
def test_the_past_of_a_user_is_read_once_a_block(monkeypatch, seen):
    """And not once a target: somebody may have thousands of both."""
    asked, original = [], next_item.seen_items

    def counted(dataset, users, split):
        asked.append(users.tolist())
        return original(dataset, users, split)

    monkeypatch.setattr(next_item, "seen_items", counted)
    data = split_dataset()
    assert evaluate(model_of(num_items=V), data, Protocol(seen=seen), "valid")
    assert asked == ([[0, 1, 2]] if seen == "exclude" else [])


def test_a_user_who_has_all_items_is_named_with_what_helps():
    data = dataset_of([[*range(12)], [3, 4, 5], [1, 2, 3]], 12)
    with pytest.raises(ValueError, match="user number 0, from 0, has 0 unseen items, .*full cand"):
        evaluate(model_of(num_items=12), data, Protocol("sampled", negatives=1))
