# SPDX-License-Identifier: Apache-2.0
"""Whole runs for items of another catalogue, and what their models recommend."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from builders import Killed, cold_stage, killed_at, synthetic, trained_weights
from files import write
from test_data_prepare import shared

import fastrec
from fastrec import OtherCatalogue, Recommender, recommend
from fastrec.cli import main
from fastrec.data.cold_items import ColdItems, ColdRows
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.side import SideData
from fastrec.evaluation.cold_start import ColdStartJudge
from fastrec.nn.pool import Interests
from fastrec.nn.user_model import UserModel
from fastrec.objectives.cold_start import ColdItemPrediction, ColdStart
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.training.config import Recipe
from fastrec.training.evaluate import evaluate_stage
from fastrec.training.fit import fit
from fastrec.training.heads_file import load_heads


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def rows(data) -> ColdRows:
    return ColdRows(SequenceDataset.load(data))


def test_a_resumed_run_ends_with_the_same_bits_and_on_the_same_rows(data, tmp_path, monkeypatch):
    dataset = SequenceDataset.load(data)
    chosen = Recipe(cold_start=cold_stage(validate_every=6))

    def train(folder, recipe=chosen, **more):
        fit(dataset, recipe=recipe, stage="cold_start", output=folder, progress=False, **more)

    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(patch, "training_step", 5)
        with pytest.raises(Killed):
            train(tmp_path / "cut")
    other = replace(chosen, cold_items=ColdItems(seed=5))
    with pytest.raises(ValueError, match="cold_items.seed was 0, not 5"):
        train(tmp_path / "cut", other, resume=True)
    train(tmp_path / "cut", resume=True)
    whole, cut = (trained_weights(tmp_path / name) for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(cut[name])), name
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    rows = ColdRows(dataset)
    trained = rows.owners[rows.split(ColdItems())["train"]].unique()
    assert summary["users"] == len(trained), "users, not rows"


def test_from_the_command_line(data, tmp_path, capsys):
    flags = [f"--data={data}", "--config=clue", "--model.width=16", "--model.max_len=12"]
    start, run, found = tmp_path / "start", tmp_path / "run", tmp_path / "found.json"
    main(["pretrain", *flags, f"--output={start}", "--pretraining.steps=2"])
    task = [*flags, "--task=cold_start", "--cold_start.batch_size=100"]
    main(["finetune", *task, f"--init={start / 'model'}", f"--output={run}",
          "--cold_start.steps=60", "--cold_start.validate_every=30",
          "--cold_start.learning_rate=0.01"])  # fmt: skip
    assert json.loads((run / "summary.json").read_text())["taken"]
    ranks = tmp_path / "ranks.parquet"
    asked = [f"--data={data}", "--task=cold_start", f"--pretrained={run / 'model'}"]
    main(["evaluate", *asked, f"--output={found}", f"--ranks={ranks}"])
    result = json.loads(found.read_text())
    rows = ColdRows(SequenceDataset.load(data))
    test = rows.split(ColdItems())["test"]
    assert result["rows"] == len(test) and result["items"] == rows.num_cold_items
    assert result["metrics"]["model"]["MRR@10"] > 2 / rows.num_cold_items
    table = pl.read_parquet(ranks)
    assert table.columns == ["user_id", "item_id", "rank"] and table.height == len(test)
    assert table["item_id"].to_list() == rows.ids[rows.items[test].numpy()].tolist()
    mean = sum(1 / rank for rank in table["rank"] if rank <= 10) / len(test)
    assert result["metrics"]["model"]["MRR@10"] == pytest.approx(mean)
    assert "HR@k is Recall@k" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="it would be tested on rows that it has seen"):
        main(["evaluate", *asked, "--config=clue", "--cold_items.seed=1"])
    with pytest.raises(SystemExit, match=r"heads.safetensors holds no cold_start.linear.weight"):
        main(["evaluate", *task, f"--pretrained={start / 'model'}"])
    capsys.readouterr()
    main(["evaluate", f"--data={data}", f"--pretrained={run / 'model'}"])  # its own stage
    assert "HR@k is Recall@k" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was trained for align .*scores no next items"):
        main(["recommend", f"--data={data}", f"--pretrained={start / 'model'}",
              f"--output={tmp_path / 'best.csv'}"])  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A model of rows of the other catalogue, by a pool with parameters."""
    objectives = Objectives(cold_start=ColdStart(pool=Interests(2)))
    run = tmp_path_factory.mktemp("trained") / "run"
    fit(SequenceDataset.load(data), recipe=Recipe(cold_start=cold_stage(objectives=objectives)),
        stage="cold_start", output=run, progress=False)  # fmt: skip
    return run / "model"


def test_recommends_items_of_the_other_catalogue(data, rows, trained, tmp_path, capsys):
    """The best of dense scores by the pooled states, less what a user has there."""
    main(["recommend", f"--data={data}", f"--pretrained={trained}", "--k=3",
          f"--output={tmp_path / 'best.parquet'}"])  # fmt: skip
    said = "users, of the other catalogue, those that they have there left out"
    assert said in capsys.readouterr().out
    dataset, model = SequenceDataset.load(data), UserModel.from_pretrained(trained)
    side = SideData(rows, "all")
    settings = {"cold_start": ColdStart(pool=Interests(2))}
    objective = JointObjective(settings, model, side)
    load_heads(objective, trained)
    head = objective.find(ColdItemPrediction)
    users = torch.arange(dataset.num_users)
    with torch.no_grad():
        encoded = model.encode(model.inputs(dataset, users, "all"))
        scores = head.linear(head.pool(model, encoded))
    whole = scores.clone()
    scores[rows.owners, rows.items] = -torch.inf
    best = scores.topk(3).indices.numpy()
    table = pl.read_parquet(tmp_path / "best.parquet")
    assert table["item_id"].to_list() == rows.ids[best].flatten().tolist()
    assert table["user_id"].unique(maintain_order=True).to_list() == dataset.user_ids().tolist()

    other = OtherCatalogue(trained, model, dataset)
    kept = recommend(model, dataset, 3, other=other, seen="none")
    assert kept["item_id"].to_list() == rows.ids[whole.topk(3).indices.numpy()].flatten().tolist()
    some, never = rows.ids[[4, 1, 2]], rows.ids[[1]]
    few = recommend(model, dataset, 3, other=other, seen="none", allowed=some, blocked=never)
    assert set(few["item_id"].to_list()) == {*rows.ids[[4, 2]].tolist()}
    history = dataset.item_ids()[dataset.values[: dataset.offsets[1]]].tolist()
    again = recommend(model, dataset, 3, histories=[history], other=other)
    assert again["item_id"].to_list() == kept["item_id"].to_list()[:3]
    made = {}
    for what in ("items", "queries"):
        main(["embed", f"--data={data}", f"--pretrained={trained}", f"--what={what}",
              f"--output={tmp_path / what}.parquet"])  # fmt: skip
        made[what] = pl.read_parquet(tmp_path / f"{what}.parquet")
    vectors, items = (made["items"][name].to_numpy() for name in ("vector", "bias"))
    assert made["items"]["item_id"].to_list() == rows.ids.tolist()
    found = made["queries"]["query"].to_numpy() @ vectors.T + items
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    asked = Recommender(model, dataset, other=other)
    for ask, message in (
        (lambda: asked.similar(k=1), "similar is of the model's own items"),
        (lambda: asked.recommend(1, logit_adjustment=1.0), "logit_adjustment is of the model's"),
        (lambda: asked.recommend(1, allowed=["?"]), "allowed items"),
        (
            lambda: Recommender(model, dataset, program=id, other=other),
            "a program scores the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match="was trained for cold_start .* scores no next items"):
        recommend(model, dataset, 3)


def test_an_index_is_of_the_items_that_are_recommended(data, rows, trained, tmp_path, capsys):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: the index of items")
    main(["index", f"--data={data}", f"--pretrained={trained}", "--k=3",
          f"--output={tmp_path / 'cold.faiss'}"])  # fmt: skip
    assert faiss.read_index(str(tmp_path / "cold.faiss")).ntotal == rows.num_cold_items
    labels = pl.read_parquet(tmp_path / "cold.faiss.parquet")["item_id"]
    assert labels.to_list() == rows.ids.tolist()
    assert "exact answer: 1.0000" in capsys.readouterr().out


def test_the_page_recommends_from_the_other_catalogue(data, rows, trained, tmp_path, monkeypatch):
    """The block of docs/new_items.md."""
    page = Path(__file__).parent.parent / "docs" / "new_items.md"
    text = page.read_text().split("<!-- other_catalogue -->")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "cold").mkdir(parents=True)
    (tmp_path / "runs" / "cold" / "model").symlink_to(trained)
    dataset = SequenceDataset.load(data)
    names = {"fastrec": fastrec, "dataset": dataset, "model": UserModel.from_pretrained(trained)}
    exec(compile(text.split("```python")[1].split("```")[0], "new_items.md", "exec"), names)
    assert set(names["best"]["item_id"]) <= set(rows.ids.tolist())


def test_who_has_what_in_the_other_catalogue(data, rows, trained):
    dataset = SequenceDataset.load(data)
    other = OtherCatalogue(trained, UserModel.from_pretrained(trained), dataset)
    theirs = {user: [] for user in range(dataset.num_users)}
    for owner, item in zip(rows.owners.tolist(), rows.items.tolist(), strict=True):
        theirs[owner].append(item)
    users = [7, 0, 399, 7, 12]
    items, offsets = other.taken(torch.tensor(users))
    found = [items[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    assert found == [sorted(theirs[user]) for user in users]
    assert other.taken(torch.tensor([], dtype=torch.int64))[1].tolist() == [0]


def test_only_a_model_of_that_catalogue_recommends_it(data, trained, tmp_path):
    dataset, model = SequenceDataset.load(data), UserModel.from_pretrained(trained)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="heads.safetensors holds no cold_start"):
        OtherCatalogue(tmp_path / "plain", model, dataset)
    table = dataset.cold_items().with_columns(pl.col("item_id").str.replace("cold", "warm"))

    class Renamed(SequenceDataset):
        def cold_items(self):
            return table

    others = Renamed(*(getattr(dataset, name) for name in dataset.__dataclass_fields__))
    with pytest.raises(ValueError, match="it was trained to predict .*, here that output is"):
        OtherCatalogue(trained, model, others)


def test_other_items_than_those_it_was_trained_for_are_refused(data, tmp_path):
    chosen = Recipe(cold_start=cold_stage())
    fit(SequenceDataset.load(data), recipe=chosen, stage="cold_start", output=tmp_path / "run",
        progress=False)  # fmt: skip
    dataset = SequenceDataset.load(data)
    table = dataset.cold_items().with_columns(pl.col("item_id").str.replace("cold", "warm"))

    class Renamed(SequenceDataset):
        def cold_items(self):
            return table

    other = Renamed(*(getattr(dataset, name) for name in dataset.__dataclass_fields__))
    folder = tmp_path / "run" / "model"
    model = UserModel.from_pretrained(folder)
    stage = chosen.cold_start
    assert evaluate_stage(dataset, chosen, stage, model, folder)["rows"] > 0
    with pytest.raises(ValueError, match="it was trained to predict .*, here that output is"):
        evaluate_stage(other, chosen, stage, model, folder)


def test_ml_1m_split_by_genre(tmp_path):
    """What somebody saw beside animation and documentaries, and the first three of these."""
    folder = shared("ml-1m")
    movies = (folder / "movies.dat").read_text(encoding="latin-1").splitlines()
    genres = {line.split("::")[0]: line.split("::")[2].split("|") for line in movies}
    lines = (folder / "sas_to_original_items.txt").read_text().splitlines()
    original = dict(line.split() for line in lines)
    target = {
        item
        for item, movie in original.items()
        if {"Animation", "Documentary"} & {*genres.get(movie, ())}
    }
    pairs = [line.split() for line in (folder / "ml-1m.txt").read_text().splitlines()]
    source, cold, taken = [], [], Counter()
    for user, item in pairs:
        if item not in target:
            source.append(f"{user} {item}")
        elif taken[user] < 3:
            taken[user] += 1
            cold.append(f"{user},m{item}")
    write(tmp_path / "source.txt", "\n".join(source) + "\n")
    write(tmp_path / "cold.csv", "user,item\n" + "\n".join(cold) + "\n")
    report = prepare(
        tmp_path / "source.txt", tmp_path / "data", format="pairs", cold_items=tmp_path / "cold.csv"
    )
    assert report.after["users"] == 6_040
    dataset = SequenceDataset.load(tmp_path / "data")
    rows = ColdRows(dataset)
    assert len(rows.owners) == len(cold) and rows.num_cold_items <= len(target)
    assert Counter(rows.owners.tolist()).most_common(1)[0][1] == 3
    stage = cold_stage(steps=80, batch_size=256, validate_every=40, learning_rate=3e-3)
    chosen = Recipe(cold_start=stage)
    chosen = replace(chosen, model=replace(chosen.model, width=32, max_len=20, dropout=0.1))
    run = tmp_path / "run"
    fit(dataset, recipe=chosen, stage="cold_start", output=run, progress=False)
    best = json.loads((run / "summary.json").read_text())["valid"]["MRR@10"]
    parts = rows.split(ColdItems())
    popular = ColdStartJudge(rows, parts["valid"], parts["train"], [10])
    assert best > popular.metrics(popular.popularity_ranks())["MRR@10"]
