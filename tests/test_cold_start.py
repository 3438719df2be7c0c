# SPDX-License-Identifier: Apache-2.0
"""Cold-start recommendation: rows of another catalogue from a file to ranks, against plain Python
and dense scores; the split of the rows; the stage from the command line; ml-1m split by genre."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import cold_stage, model_of, synthetic

from fastrec.data.cold_items import ColdItems, ColdRows
from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.steps.baskets import Baskets
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.substitute import Substitute
from fastrec.data.views import Views
from fastrec.evaluation.cold_start import ColdStartJudge
from fastrec.objectives.align import Align
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.item_attributes import ItemAttributes
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.objectives.rating import Rating
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.graphed import GraphedObjective
from fastrec.training.stage import Stage


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def rows(data) -> ColdRows:
    return ColdRows(SequenceDataset.load(data))


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
    for step in (
        Friend(),
        Substitute(),
        Insert(),
        SameTarget(),
        OneOf([Crop(), Insert()]),
        Baskets(),
    ):
        with pytest.raises(ValueError, match=r"the step \w+ has no place in a stage with judge"):
            cold_stage(views={"main": [step]})
    for other in (Contrast(["main", "b"]), Segments(["main", "b"]), Rating(), ItemAttributes()):
        # Rows of one person were negatives of each other.
        two = {"c": ColdStart(), "other": other, "align": Align(["main", "b"])}
        with pytest.raises(ValueError, match="the objective other cannot be trained beside c"):
            cold_stage(objectives=two, views={"main": [], "b": []})
    two = Objectives(cold_start=ColdStart(), align=Align(["main", "b"]))
    assert cold_stage(objectives=two, views={"main": [], "b": []}).monitored == "MRR@10"
    with pytest.raises(ValueError, match="cold_start needs a stage with judge: cold_start"):
        ColdStart().build(model_of(tokens=["ur"]), SideData(object.__new__(FakeData)))


class FakeData:
    num_items, num_users = 3, 2
