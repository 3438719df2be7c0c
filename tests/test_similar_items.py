# SPDX-License-Identifier: Apache-2.0
"""The most similar items by common users, against CoSeRec's formula in dictionaries."""

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import dataset_of, model_of, synthetic

from fastrec.cli import main
from fastrec.data import similar_items
from fastrec.data.dataset import SequenceDataset
from fastrec.data.side import SideData
from fastrec.nn.similar import SimilarItems
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe
from fastrec.training.model_folder import hashes
from fastrec.training.start import seen_by_run

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
    items, scores, lowest = similar_items.nearest(dataset_of(histories, V), "all")
    assert torch.equal(items, found) and lowest.dtype == scores.dtype == torch.float32
    rows = correlations(histories)
    assert scores.tolist() == pytest.approx(
        [max(rows[i].values(), default=-math.inf) for i in range(V)]
    )
    assert lowest.item() == pytest.approx(min(s for row in rows.values() for s in row.values()))


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


# By a model


def by_model(table: torch.Tensor) -> dict[tuple[int, int], float]:
    """e_i . e_j of all pairs of different items."""
    V = len(table)
    return {(i, j): (table[i] @ table[j]).item() for i in range(V) for j in range(V) if i != j}


def hybrid(table: torch.Tensor, histories: list[list[int]]) -> list[int]:
    """The larger of the best scaled similarity of each kind, over dictionaries."""
    kinds = [
        {(i, j): score for i, row in correlations(histories).items() for j, score in row.items()},
        by_model(table),
    ]
    out = []
    for item in range(len(table)):
        best = []
        for kind in kinds:
            low, high = min(kind.values()), max(kind.values())
            scaled = {j: (s - low) / (high - low) for (i, j), s in kind.items() if i == item}
            best += [max(scaled.items(), key=lambda pair: (pair[1], -pair[0]))] if scaled else []
        out.append(max(best, key=lambda pair: pair[1])[0])
    return out


@pytest.mark.parametrize("seed", range(4))
def test_by_a_model_and_by_both(seed):
    model = model_of(num_items=V)
    torch.nn.init.normal_(model.item_embedding.weight)
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, 12, generator.integers(0, 5)).tolist() for _ in range(9)]
    table, data = model.item_table.detach(), dataset_of(histories, V)
    pairs = by_model(table)
    expected = [max((s, -j) for (i, j), s in pairs.items() if i == k)[1] * -1 for k in range(V)]
    assert SimilarItems(model, users=False)(data, "all").tolist() == expected
    found = SimilarItems(model)(data, "all").tolist()
    assert found == hybrid(table, histories)
    by_users = similar_items.most_similar(data, "all").tolist()
    assert any(f != e for f, e in zip(found, expected, strict=True)), "some are by users"
    assert any(f != u and u >= 0 for f, u in zip(found, by_users, strict=True)), "some by the model"


def test_without_common_users_the_model_says_it_and_alone_an_item_is_like_none():
    model, empty = model_of(num_items=3), dataset_of([[0], [1], [2]], 3)
    assert SimilarItems(model)(empty, "all").equal(SimilarItems(model, users=False)(empty, "all"))
    assert SimilarItems(model_of(num_items=1))(dataset_of([[0, 0]], 1), "all").tolist() == [-1]


def test_a_run_asks_a_model_that_is_named(tmp_path):
    data = synthetic(tmp_path, num_users=60, num_items=30)
    flags = ["--config=coserec", f"--data={data}", "--model.width=8", "--model.max_len=8",
             "--pretraining.steps=2", "--pretraining.warmup_steps=0"]  # fmt: skip
    warm = tmp_path / "warm" / "model"
    main(["pretrain", *flags, f"--output={tmp_path / 'warm'}"])
    model = UserModel.from_pretrained(warm)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(SimilarItems, "__call__", lambda self, *rest: asked.append(self) or whole)
        whole = torch.full((30,), 7)
        main(["finetune", *flags, "--task=pretraining", f"--init={warm}",
              f"--pretraining.similar.model={warm}", f"--output={tmp_path / 'next'}"])  # fmt: skip
    assert len(asked) == 1 and asked[0].users and torch.equal(asked[0].table, model.item_table)
    with pytest.raises(SystemExit, match="similar has no effect: no view has the step substitute"):
        main(["pretrain", "--config=sasrec", *flags[1:], f"--output={tmp_path / 'x'}",
              f"--pretraining.similar.model={warm}"])  # fmt: skip
    with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
        main(["pretrain", *flags, f"--output={tmp_path / 'x'}", "--users.fraction=0.5",
              f"--pretraining.similar.model={warm}"])  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_a_model_has_seen_whom_the_one_that_it_asks_has_seen(tmp_path):
    dataset = SequenceDataset.load(synthetic(tmp_path, num_users=30, num_items=V))
    asked = model_of(num_items=V)
    asked.seen_users = np.sort(hashes(np.array([5, 900])))
    asked.save_pretrained(tmp_path / "asked")
    chosen = Recipe.load("coserec", similar={"model": str(tmp_path / "asked")})
    users = torch.arange(30)
    seen = seen_by_run(dataset, users, chosen, chosen.pretraining, None, None, None)
    assert np.array_equal(seen, np.sort(hashes(np.array([*range(30), 900]))))
    asked.seen_users = None
    asked.save_pretrained(tmp_path / "asked")
    assert seen_by_run(dataset, users, chosen, chosen.pretraining, None, None, None) is None
