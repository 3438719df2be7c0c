# SPDX-License-Identifier: Apache-2.0
"""The index of FAISS has the scores of the model, and its recall is counted right."""

import os
import sys

import numpy as np
import polars
import pytest
from builders import model_of, synthetic
from torch import nn

import fastrec
from fastrec.__main__ import main as entry
from fastrec.cli import main
from fastrec.index import write_index

faiss = pytest.importorskip("faiss", reason="faiss is not installed: the index of items")
V = 300


@pytest.fixture
def asked(tmp_path):
    """(a Recommender of a model whose biases matter, the queries of its users)."""
    dataset = fastrec.SequenceDataset.load(synthetic(tmp_path, num_users=40, num_items=V))
    model = model_of(num_items=dataset.num_items, width=8, causal=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.item_head.bias, std=2.0)
    recommender = fastrec.Recommender(model, dataset)
    return recommender, recommender.queries()


def test_a_flat_index_gives_what_recommend_does(asked, tmp_path):
    recommender, queries = asked
    index = fastrec.item_index(recommender.model, recommender.dataset)
    write_index(index, tmp_path / "items.faiss", polars.DataFrame({"item_id": [0]}))
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    scores, rows = index.search(fastrec.index_queries(queries), 10)
    best = recommender.recommend(10, seen="none")
    assert rows.flatten().tolist() == best["item_id"].to_list()
    np.testing.assert_allclose(scores.flatten(), best["score"].to_numpy(), rtol=1e-5, atol=1e-5)
    assert fastrec.index_recall(index, recommender, queries, 10) == (1.0, 10, len(queries))


def test_recall_counts_what_an_index_misses(asked):
    recommender, queries = asked
    best = recommender.recommend(10, seen="none")["item_id"].to_numpy().reshape(-1, 10)

    class Half:
        """Finds the best five, one of them twice, and what there is not."""

        def search(self, asked, k):
            assert asked.shape == (len(queries), 9) and (asked[:, -1] == 1).all()
            return None, np.column_stack([best[:, :5], best[:, :1], np.full((len(best), 4), -1)])

    assert fastrec.index_recall(Half(), recommender, queries, 10).share == 0.5
    cells = fastrec.item_index(recommender.model, recommender.dataset, "IVF30,Flat")
    some = fastrec.index_recall(cells, recommender, queries).share
    faiss.ParameterSpace().set_index_parameters(cells, "nprobe=30")
    assert some < fastrec.index_recall(cells, recommender, queries).share == 1.0
    with pytest.raises(ValueError, match="k must be from 1 to 300, the items, got 0"):
        fastrec.index_recall(cells, recommender, queries, 0)


@pytest.mark.parametrize(
    "factory, search, message",
    [
        ("Nope", "", "'Nope' of 300 items: could not parse index string Nope"),
        ("Flat", "nprobe=3", "could not set parameter nprobe"),
        ("IVF301,Flat", "", "Number of training points"),
    ],
)
def test_what_faiss_does_not_know_is_an_error(asked, factory, search, message):
    with pytest.raises(ValueError, match=message):
        fastrec.item_index(asked[0].model, asked[0].dataset, factory, search)


def test_without_faiss_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(sys, "argv", ["fastrec", *command_of(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"error: an index needs .* pip install 'fastrec\[faiss\]'"
    ):
        entry()


def command_of(tmp_path, *more) -> list[str]:
    dataset = fastrec.SequenceDataset.load(synthetic(tmp_path, num_users=50, num_items=40))
    model = fastrec.UserModel(dataset.num_items, fastrec.ModelConfig(width=8, max_len=6))
    model.save_pretrained(tmp_path / "model")
    return [
        "index", f"--data={tmp_path / 'data'}", f"--pretrained={tmp_path / 'model'}",
        f"--output={tmp_path / 'items.faiss'}", *more,
    ]  # fmt: skip


def test_command(tmp_path, capsys):
    flags = command_of(tmp_path, "--factory=HNSW8", "--search=efSearch=64", "--queries=20")
    main(flags)
    said = capsys.readouterr().out
    assert "40 items, HNSW8" in said and "recall@10 of 20 users" in said
    assert float(said.rsplit(": ", 1)[1]) > 0.9
    ids = polars.read_parquet(tmp_path / "items.faiss.parquet")["item_id"].to_list()
    assert ids == fastrec.SequenceDataset.load(tmp_path / "data").item_ids().tolist()
    assert faiss.read_index(str(tmp_path / "items.faiss")).ntotal == 40
    with pytest.raises(SystemExit, match=r"items\.faiss is there already"):
        main(flags)


def test_killed_between_its_files_it_leaves_no_index_beside_the_labels_of_another(
    tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    flags = command_of(tmp_path, "--overwrite=true")
    main(flags)
    index, put = tmp_path / "items.faiss", []

    def replace(source, target):
        put.append(target)
        if len(put) == 2:
            raise Killed
        os.rename(source, target)

    monkeypatch.setattr("fastrec.data.output.os.replace", replace)
    with pytest.raises(Killed):
        main(flags)
    assert put[1] == index and not index.exists()
    monkeypatch.undo()
    (tmp_path / ".new.items.faiss.parquet").touch()  # that a killed process was writing
    main(flags)
    assert not list(tmp_path.glob(".new.*"))
    assert faiss.read_index(str(index)).ntotal == 40
