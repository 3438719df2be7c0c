# SPDX-License-Identifier: Apache-2.0
"""Cold-start recommendation: rows of another catalogue from a file to ranks, against plain Python
and dense scores; the split of the rows; the stage from the command line; ml-1m split by genre."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from builders import Killed, killed_at, lists_of, model_of, synthetic, trained_weights
from files import fails, write
from test_data_prepare import shared

import fastrec
from fastrec import OtherCatalogue, Recommender, recommend
from fastrec.cli import main
from fastrec.data.cold_items import ColdItems, ColdRows
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.loader import SequenceLoader
from fastrec.data.prepare import prepare
from fastrec.data.prepare.side_tables import read_cold_items
from fastrec.data.side import SideData
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.substitute import Substitute
from fastrec.data.views import Views
from fastrec.evaluation.cold_start import ColdStartJudge
from fastrec.nn.pool import Interests
from fastrec.nn.user_model import UserModel
from fastrec.objectives.align import Align
from fastrec.objectives.cold_start import ColdItemPrediction, ColdStart
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.evaluate import evaluate_stage
from fastrec.training.fit import fit
from fastrec.training.graphed import GraphedObjective
from fastrec.training.model_folder import load_heads
from fastrec.training.stage import Stage

EVENTS = "user,item,time\n7,b,1\n7,a,2\n7,c,3\n9,a,1\n9,b,2\n9,c,3\n12,a,1\n12,c,2\n12,b,4\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def rows(data) -> ColdRows:
    return ColdRows(SequenceDataset.load(data))


# From a file


def prepared(tmp_path, text: str, **settings):
    source = write(tmp_path / "events.csv", EVENTS)
    return prepare(
        source, tmp_path / "data", cold_items=write(tmp_path / "cold.csv", text), **settings
    )


def test_rows_keep_their_original_ids(tmp_path):
    text = "user,item\n9,z9\n7,z1\n9,z10\n5,z1\n9,z9\n12,z1\n7,z0\n"
    report = prepared(tmp_path, text)
    assert report.removed == {
        "cold-start rows of users without interactions": 1,
        "cold-start rows that are there twice": 1,
    }
    assert "cold start: 5 rows of 3 users and 4 items of another catalogue" in str(report)
    dataset = SequenceDataset.load(tmp_path / "data")
    table = dataset.cold_items()
    users = dataset.user_ids()[table["user"].to_numpy()].tolist()
    assert list(zip(users, table["item_id"], strict=True)) == [
        (7, "z1"), (7, "z0"), (9, "z9"), (9, "z10"), (12, "z1"),
    ]  # fmt: skip
    found = ColdRows(dataset)
    assert found.ids.tolist() == ["z0", "z1", "z10", "z9"], "in the order of the ids"
    assert found.items.tolist() == [1, 0, 3, 2, 1] and found.num_cold_items == 4
    assert found.num_items == 3 and found.num_users == 5
    batch = found.gather([3, 1, 2], "all")
    items = [[dataset.item_ids()[item] for item in row] for row in lists_of(batch)]
    assert items == [["a", "b", "c"], ["b", "a", "c"], ["a", "b", "c"]], "the users' whole history"
    assert batch.keys.tolist() == [3, 1, 2], "a row has a key of its own"


def test_ids_of_both_catalogues_have_nothing_to_do_with_each_other(tmp_path):
    """Items may be numbers there and text here; a table without a header is read as links are."""
    prepared(tmp_path, "7,30\n9,4\n9,30\n")
    dataset = SequenceDataset.load(tmp_path / "data")
    assert ColdRows(dataset).ids.tolist() == [4, 30]
    frame = pl.DataFrame({"who": [7, 12], "what": ["q", "r"]})
    prepare(tmp_path / "events.csv", tmp_path / "other", cold_items=frame)
    assert ColdRows(SequenceDataset.load(tmp_path / "other")).ids.tolist() == ["q", "r"]


def test_wrong_files_are_named(tmp_path):
    foreign = "column 'user_id': none of its 2 ids occurs in the interactions: 1 here, 7 there"
    with pytest.raises(DataError, match=foreign):
        prepared(tmp_path, "user,item\n1,a\n2,b\n")
    file = write(tmp_path / "one.csv", "user\n7\n8\n")
    fails(read_cold_items, file, file=file, match="expected two columns of ids, got")
    file = write(tmp_path / "gap.csv", "user,item\n7,a\n8,\n")
    fails(read_cold_items, file, file=file, column="item", row=3)
    with pytest.raises(DataError, match="expected two columns of ids, got"):
        prepare(tmp_path / "events.csv", tmp_path / "d", cold_items=pl.DataFrame({"user": [7]}))


def test_a_data_set_without_rows_says_what_is_missing(tmp_path):
    write(tmp_path / "events.csv", EVENTS)
    prepare(tmp_path / "events.csv", tmp_path / "data")
    dataset = SequenceDataset.load(tmp_path / "data")
    assert dataset.cold_items() is None
    with pytest.raises(DataError, match=r"cold_items.parquet: file is missing: .* --cold_items"):
        ColdRows(dataset)


def test_a_damaged_file_is_refused(tmp_path):
    prepared(tmp_path, "7,30\n9,4\n")
    file = tmp_path / "data" / "cold_items.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DataError, match=r"cold_items.parquet: is not the file that was written"):
        SequenceDataset.load(tmp_path / "data")


# The split


def test_rows_are_split_at_random(rows):
    parts = rows.split(ColdItems())
    count = len(rows.owners)
    assert len(parts["test"]) == round(0.15 * count) and len(parts["valid"]) == round(0.05 * count)
    together = torch.cat(list(parts.values()))
    assert torch.equal(together.sort().values, torch.arange(count)), "every row once"
    owners = {name: set(rows.owners[part].tolist()) for name, part in parts.items()}
    assert owners["train"] & owners["test"], "a user may be in several"
    again, other = rows.split(ColdItems()), rows.split(ColdItems(seed=1))
    assert all(torch.equal(again[name], parts[name]) for name in parts)
    assert not torch.equal(other["test"], parts["test"])


def test_users_are_split_with_all_their_rows(rows):
    parts = rows.split(ColdItems(by="user", valid=0.1, test=0.2))
    owners = [set(rows.owners[part].tolist()) for part in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    people = len(rows.owners.unique())
    assert [len(o) for o in owners[1:]] == [round(0.1 * people), round(0.2 * people)]
    assert sum(map(len, parts.values())) == len(rows.owners)


@pytest.mark.parametrize("by", ["row", "user"])
def test_fractions_are_nested_and_leave_the_test_alone(rows, by):
    found = [rows.split(ColdItems(by=by, fraction=f)) for f in (0.4, 0.6, 0.8, 1.0)]
    for less, more in pairwise(found):
        assert set(less["train"].tolist()) < set(more["train"].tolist())
        assert torch.equal(less["test"], more["test"])
        assert torch.equal(less["valid"], more["valid"])
    share = len(found[0]["train"]) / len(found[-1]["train"])
    assert abs(share - 0.4) < 0.03


def test_wrong_splits_are_refused(rows):
    for settings, message in [
        ({"valid": 0.0}, r"cold_items\.valid must be in \(0, 1\), got 0"),
        ({"valid": 0.5, "test": 0.5}, "no row would train"),
        ({"fraction": 0.0}, r"cold_items\.fraction must be in \(0, 1\], got 0"),
        ({"by": "item"}, "by must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            ColdItems(**settings)
    with pytest.raises(ValueError, match="cold_items leaves no row for valid: there are .* rows"):
        rows.split(ColdItems(valid=1e-6))


# Objective and judge


def system(rows: ColdRows, **settings):
    model = model_of(num_items=rows.num_items, tokens=["ur"], causal=True, pre_norm=True)
    side = SideData(rows, "all")
    objective = JointObjective({"cold_start": ColdStart(**settings)}, model, side)
    views = Views({"main": []}, model.frame, side, model.config.max_len)
    return model, objective, side, views


def test_every_row_is_trained_once_an_epoch(rows):
    """A user with g items has g rows, in whatever batches."""
    _, _, _, views = system(rows)
    train = rows.split(ColdItems())["train"]
    loader = SequenceLoader(views, batch_size=50, users=train)
    seen: Counter = Counter()
    for step in range(loader.batches_per_epoch):
        batch = loader.batch_at(step)["main"]
        for row, item in zip(batch.sample_ids.tolist(), batch.users["cold_item"], strict=True):
            seen[int(rows.owners[row]), int(item)] += 1
    expected = Counter(zip(rows.owners[train].tolist(), rows.items[train].tolist(), strict=True))
    assert seen == expected and max(Counter(rows.owners[train].tolist()).values()) > 1


@pytest.mark.parametrize("pool", ["ur", "mean", "attention"])
def test_loss_is_cross_entropy_over_the_other_catalogue(rows, pool):
    model, objective, _, views = system(rows, pool=pool)
    batch = SequenceLoader(views, batch_size=40).batch_at(0)
    (term,) = objective(model, batch, Rng(1, 2))
    part = objective.parts["cold_start"]
    users = part.pool(model, model.encode_views(batch, Rng(1, 2))["main"])
    scores = users @ part.linear.weight.T + part.linear.bias
    assert scores.shape == (40, rows.num_cold_items)
    expected = F.cross_entropy(scores, rows.items[batch["main"].sample_ids])
    torch.testing.assert_close(term.loss, expected)
    assert (term.name, int(term.number)) == ("cold_start", 40)
    leaves = [*part.parameters(), model.item_embedding.weight]
    pairs = zip(*(torch.autograd.grad(each, leaves) for each in (term.loss, expected)), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_padding_is_no_row(rows):
    model, objective, _, views = system(rows)
    loader = SequenceLoader(views, batch_size=30, users=torch.arange(50))
    graphed = GraphedObjective(model, objective, 3, capture=lambda losses, packs: losses)
    for step in range(4):  # 30 and 20 rows
        (padded,), (plain,) = (
            graphed(loader.batch_at(step), step),
            objective(model, loader.batch_at(step), Rng(3, step)),
        )
        torch.testing.assert_close(padded.loss, plain.loss)


def test_ranks_are_those_of_dense_scores(rows):
    model, objective, _, _ = system(rows)
    parts = rows.split(ColdItems())
    torch.nn.init.normal_(objective.parts["cold_start"].linear.bias)
    judge = ColdStartJudge(rows, parts["test"], parts["train"], [1, 10])
    ranks = torch.cat(
        [judge.score(model, objective, slice(a, a + 20)) for a in range(0, len(judge), 20)]
    )
    part = objective.parts["cold_start"]
    for place in (0, 7, len(judge) - 1):
        row = int(parts["test"][place])
        batch = model.inputs(rows.dataset, rows.owners[row : row + 1], "all")
        user = model.pool(model.encode(batch), "ur")[0]
        scores = part.linear.weight @ user + part.linear.bias
        item = int(rows.items[row])
        assert ranks[place] == 1 + int((scores > scores[item]).sum())
    metrics = judge.metrics(ranks)
    hits = [1.0 if rank <= 10 else 0.0 for rank in ranks.tolist()]
    assert metrics["HR@10"] == pytest.approx(sum(hits) / len(hits)), "Recall@10 of one item"
    reciprocal = [hit / rank for hit, rank in zip(hits, ranks.tolist(), strict=True)]
    assert metrics["MRR@10"] == pytest.approx(sum(reciprocal) / len(hits))
    assert list(metrics) == judge.metric_names
    counts = Counter(rows.items[parts["train"]].tolist())
    order = sorted(range(rows.num_cold_items), key=lambda item: (-counts[item], item))
    expected = [order.index(item) + 1 for item in rows.items[parts["test"]].tolist()]
    assert judge.popularity_ranks().tolist() == expected


def cold_stage(**settings) -> Stage:
    return Stage(
        **{
            "views": {"main": []},
            "objectives": Objectives(cold_start=ColdStart(pool="max")),
            "judge": "cold_start",
            "steps": 6, "batch_size": 100, "validate_every": 3, "checkpoint_every": 2,
            **settings,
        }
    )  # fmt: skip


def test_stages_that_cannot_be_are_refused():
    both = Objectives(cold_start=ColdStart(), item=Item())
    for make, message in [
        (lambda: cold_stage(judge="next_item"), "cold_start needs judge: cold_start"),
        (lambda: cold_stage(objectives=Objectives(item=Item())), "needs the objective cold_start"),
        (lambda: cold_stage(objectives=both), "item cannot be trained beside cold_start"),
        (
            lambda: cold_stage(objectives={"c": ColdStart(), "u": UserAttributes()}),
            "the objective u cannot be trained beside c",
        ),
        (lambda: Recipe(cold_items=ColdItems(seed=1), pretraining=Stage(
            views={"main": []}, objectives={"i": Item()}, judge="attributes"
        )), "cold_items has no effect: no stage judges cold_start"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    for step in (Friend(), Substitute(), Insert(), SameTarget(), OneOf([Crop(), Insert()])):
        with pytest.raises(ValueError, match=r"the step \w+ has no place in a stage with judge"):
            cold_stage(views={"main": [step]})
    contrast = Contrast(["main", "b"], false_negatives=["profile"])
    two = Objectives(cold_start=ColdStart(), contrast=contrast)
    with pytest.raises(ValueError, match="profile has no place in a stage with judge: cold_start"):
        cold_stage(objectives=two, views={"main": [], "b": []})
    two = Objectives(cold_start=ColdStart(), align=Align(["main", "b"]))
    assert cold_stage(objectives=two, views={"main": [], "b": []}).monitored == "MRR@10"
    with pytest.raises(ValueError, match="cold_start needs a stage with judge: cold_start"):
        ColdStart().build(model_of(tokens=["ur"]), SideData(object.__new__(FakeData)))


class FakeData:
    num_items, num_users = 3, 2


# A whole run


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
    with pytest.raises(SystemExit, match="was trained for vectors .*scores no next items"):
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


# Real data, beside the repository


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
