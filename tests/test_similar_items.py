# SPDX-License-Identifier: Apache-2.0
"""The most similar items by common users, against CoSeRec's formula in dictionaries."""

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import dataset_of

from fastrec.data import similar_items
from fastrec.data.side import SideData

V = 17


def correlations(histories: list[list[int]]) -> dict[int, dict[int, float]]:
    """Cor(i, j) of all pairs with a common user."""
    users = [list(dict.fromkeys(items[-200:])) for items in histories]
    popularity = Counter(item for items in users for item in items)
    found: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for items in users:
        for i in items:
            for j in items:
                if i != j:
                    found[i][j] += 1 / math.log(1 + len(items))
    for i, row in found.items():
        for j in row:
            row[j] /= math.sqrt(popularity[i] * popularity[j])
    return found


def best(histories: list[list[int]], num_items: int) -> list[int]:
    found, out = correlations(histories), []
    for item in range(num_items):
        ranked = sorted(found[item].items(), key=lambda pair: (-np.float32(pair[1]), pair[0]))
        out.append(ranked[0][0] if ranked else -1)
    return out


@pytest.mark.parametrize("block", [1 << 22, 40, 3])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula(seed, block, monkeypatch):
    """Also where items, and parts of one, fill a block."""
    monkeypatch.setattr(similar_items, "_BLOCK", block)
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, 15, generator.integers(0, 9)).tolist() for _ in range(30)]
    found = similar_items.most_similar(dataset_of(histories, V), "all")
    assert found.tolist() == best(histories, V) and found.dtype == torch.int64
    assert found[15:].tolist() == [-1, -1]


def test_by_hand():
    """1 / ln 3 for a pair of a user with two items, 1 / ln 4 with three, over the roots."""
    histories = [[0, 1], [0, 1, 2], [0, 3], [0, 0]]
    found = correlations(histories)
    assert found[0][1] == pytest.approx((1 / math.log(3) + 1 / math.log(4)) / math.sqrt(4 * 2))
    assert found[2][1] == pytest.approx(1 / math.log(4) / math.sqrt(2))
    similar = similar_items.most_similar(dataset_of(histories, 5), "all")
    assert similar.tolist() == [1, 0, 1, 0, -1]
    ties = similar_items.most_similar(dataset_of([[3, 2, 4]], 5), "all")
    assert ties.tolist() == [-1, -1, 3, 2, 2], "the smaller id"


def test_only_training_items_of_the_users_count():
    histories = [[0, 1, 2, 2], [0, 3, 4, 4], [0, 1, 5, 5], [5]]
    dataset = dataset_of(histories, 6)
    assert similar_items.most_similar(dataset).tolist() == best([[0, 1], [0, 3], [0, 1]], 6)
    assert SideData(dataset, labelled=[1, 3]).similar_items.tolist() == [3, -1, -1, 0, -1, -1]
    splits = np.array([[1, 2], [4, 4], [2, 3], [1, 1]])
    kept = similar_items.most_similar(replace(dataset, splits=splits))
    assert kept.tolist() == best([[0], [0, 3, 4, 4], [0, 1], [5]], 6)


def test_the_latest_items_of_a_long_history_count():
    history = [*range(300), 7]
    found = similar_items.most_similar(dataset_of([history], 300), "all")
    assert found[7] == 101 and (found[:7] == -1).all() and found[100] == -1
    assert found.tolist() == best([history], 300)


def test_nothing_is_like_nothing():
    assert similar_items.most_similar(dataset_of([[1], [2, 2], []], 3), "all").tolist() == [-1] * 3
