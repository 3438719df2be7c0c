# SPDX-License-Identifier: Apache-2.0
"""The input of items beside their ids: attributes, ratings and time gaps, one event at a time in
plain Python; from a csv file to recommendations."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import (
    Known,
    loader_of,
    model_of,
)
from catalogue import COLUMNS, GENRES, PARTS, V, catalogue, events_of, model_with, raw_items, summed

from fastrec.data.batch import JaggedBatch, framed, from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.graph import SocialGraph
from fastrec.data.item_categories import item_categories
from fastrec.data.side import Shard, SideData
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.reorder import Reorder
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_parts import ItemAttribute, Rating, TimeGap
from fastrec.nn.items import Items
from fastrec.nn.layouts import bert_state
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.graphed import GraphedObjective


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return catalogue(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def dataset(folder):
    return SequenceDataset.load(folder / "data")


def oracle(model: UserModel, batch: JaggedBatch) -> torch.Tensor:
    """[T, D], event by event, with categories from the raw items."""
    state, settings = model.item_input.state_dict(), model.config.items
    known, rows = raw_items(), []
    for event, value in enumerate(batch.values.tolist()):
        genres, brand = known.get(value, (None, None))
        found = {
            "genres": [GENRES[name] for name in genres or []],
            "brand": [["acme", "zeta"].index(brand)] if brand else [],
        }
        parts = [state["ids.weight"][value]]
        for place, (name, attribute) in enumerate(settings.attributes.items()):
            table = state[f"attributes.{place}.classes.weight"]
            kept = found[name][: attribute.most]
            parts.append(sum((table[c] for c in kept), torch.zeros(attribute.width))
                         / max(len(kept), 1))  # fmt: skip
        if settings.rating is not None:
            stars = float(batch.events["rating"][event])
            how = settings.rating
            level = (
                how.levels if math.isnan(stars) else math.floor((stars - how.low) / how.step + 0.5)
            )
            parts.append(state["levels.rating.weight"][level])
        if settings.time_gap is not None:
            gap = float(batch.events["time_gap"][event])
            level = 64 if math.isnan(gap) else math.floor(math.log2(1 + gap))
            parts.append(state["levels.time_gap.weight"][level])
        if settings.combine == "sum":
            row = sum(parts)
        else:
            row = state["join.weight"] @ torch.cat(parts) + state["join.bias"]
        rows.append(row * (model.config.width**0.5 if settings.scale else 1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "items",
    [
        PARTS,
        replace(PARTS, scale=True),
        replace(PARTS, attributes={}, time_gap=None),
        Items(time_gap=TimeGap()),
        Items(attributes={"brand": ItemAttribute(width=2)}),
        summed(),
        summed(scale=True),
    ],
    ids=["all", "scaled", "rating", "gap", "brand", "sum", "sum_scaled"],
)
def test_the_input_is_that_of_one_event_at_a_time(dataset, items):
    model = model_with(dataset, items, tokens=["cls", "sep"])
    for parameter in model.item_input.parameters():
        torch.nn.init.normal_(parameter)
    batch = model.inputs(dataset, dataset.users("test"), "test", ask=True)
    assert model.event_columns == list(batch.events)
    made = model.item_input(batch)
    assert made.values is None
    expected = oracle(model, batch)
    torch.testing.assert_close(made.table, expected, rtol=1e-5, atol=1e-5)
    # Items are scored by their ids alone.
    assert torch.equal(model.item_table, model.item_input.ids.weight[:V])
    weights = torch.randn_like(expected)
    (made.table * weights).sum().backward()
    for name, parameter in model.item_input.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_parts_an_encoder_gathers_the_rows_itself():
    model = model_of(num_items=V)
    batch = model.inputs_of([[1, 2, 3]])
    rows = model.item_input(batch)
    assert rows.table is model.item_input.ids.weight and rows.values is batch.values
    assert list(model.item_input.state_dict()) == ["ids.weight"] and batch.events == {}
    assert model.event_columns == []


def test_a_concatenation_begins_as_the_id(dataset):
    model = model_with(dataset, width=64)
    batch = model.inputs(dataset, [0, 1], "all")
    ids = model.item_embedding(batch.values)
    rest = model.item_input(batch).table - ids
    assert rest.abs().max() < 0.1 * ids.abs().max() and rest.abs().min() > 0


def test_tokens_masks_and_histories_have_no_attributes_ratings_or_gaps(dataset):
    model = model_with(dataset, tokens=["cls"])
    batch = model.inputs(dataset, [3], "all", ask=True)
    token = batch.values >= V
    assert token.sum() == 2
    for name in COLUMNS:
        assert batch.events[name][token].isnan().all()
    assert not batch.events["rating"][~token].isnan().any()
    given = model.inputs_of([batch.values[~token].tolist()], ask=True)
    assert torch.equal(given.values, batch.values)
    assert all(given.events[name].isnan().all() for name in COLUMNS)
    assert torch.isfinite(model.encode(given).states).all()
    with pytest.raises(ValueError, match=r"the batch has no event column 'rating', which the"):
        model.encode(model.frame(dataset.gather([3], "all", 5)))


def test_a_rating_out_of_range_is_an_error_where_it_is_read(dataset):
    model = model_with(dataset, Items(rating=Rating(2, 5)))
    users = [int(user) for user in dataset.users("test") if min(
        rating for _, rating, _ in events_of(user)[-10:]) < 1.5][:1]  # fmt: skip
    with pytest.raises(ValueError, match=r"rating 1, model\.items\.rating has the levels 2 to 5"):
        model.inputs(dataset, users, "all")


def test_item_features_must_be_those_of_the_settings(dataset):
    config, made = ModelConfig(items=PARTS), item_categories(dataset, PARTS.most)
    with pytest.raises(
        ValueError, match=r"attributes and features \['genres', 'brand'\], the item"
    ):
        UserModel(V, config)
    with pytest.raises(ValueError, match=r"features \[\], the item features are \['genres'"):
        UserModel(V, ModelConfig(), item_features=made)
    with pytest.raises(ValueError, match=r"of 'genres' must be a table \[7, 2\] of at least"):
        UserModel(7, config, item_features=made)
    one, two = (UserModel(V, config, item_features=made) for _ in range(2))
    assert one.item_input.attributes[0].table is not two.item_input.attributes[0].table
    with pytest.raises(ValueError, match=r"BertModel has no place for model\.items: Items\("):
        bert_state(one)


def batch_with_columns() -> JaggedBatch:
    generator = np.random.default_rng(1)
    lengths = [7, 1, 0, 12, 5]
    batch = from_sequences([generator.integers(V, size=n).tolist() for n in lengths])
    total = len(batch.values)
    # Each event has a rating and a gap of its own.
    rating, gap = torch.arange(total).float(), torch.arange(total).double() * 100
    return replace(batch, events={"rating": rating, "time_gap": gap})


def side_of(batch) -> SideData:
    return SideData(SimpleNamespace(num_items=V, num_users=10))


@pytest.mark.parametrize("step", [Mask(share=0.5), Mask(0.5, replace=0.4, random=0.3), MaskLast(2)])
def test_a_masked_item_shows_no_rating_and_keeps_its_gap(step):
    """But for items that nothing follows, as the one that is asked for: who asks knows no time."""
    batch = batch_with_columns()
    before = {name: column.clone() for name, column in batch.events.items()}
    made = step(batch, Rng(1, 2), side_of(batch))
    chosen = made.events["target"] != -100
    assert 4 <= chosen.sum() < len(batch.values)
    assert torch.equal(made.events["rating"].isnan(), chosen)
    assert torch.equal(made.events["rating"][~chosen], before["rating"][~chosen])
    hidden = chosen if isinstance(step, MaskLast) else torch.zeros_like(chosen)
    assert torch.equal(made.events["time_gap"].isnan(), hidden)
    assert torch.equal(made.events["time_gap"][~hidden], before["time_gap"][~hidden])
    assert all(torch.equal(batch.events[name], before[name]) for name in before)


@pytest.mark.parametrize("step", [MaskLast(), Cut(1)])
def test_the_last_item_is_masked_as_it_is_asked_for(dataset, step):
    model = model_with(dataset)
    batch = dataset.gather([1, 2, 3], "all", 9, COLUMNS)
    asked = model.frame(batch.runs(torch.zeros(3).long(), batch.lengths - 1), ask=True)
    made = model.frame(step(batch, Rng(0, 0), side_of(batch)))
    assert torch.equal(made.values, asked.values)
    for name in COLUMNS:
        torch.testing.assert_close(made.events[name], asked.events[name], equal_nan=True)


@pytest.mark.parametrize("step", [Crop(0.6), Reorder(0.6), NextItem(), OneOf([Crop(), Mask()])])
def test_columns_follow_their_events(step):
    batch = batch_with_columns()
    made = step(batch, Rng(1, 2), side_of(batch))
    items = batch.values.tolist()
    for value, rating, gap in zip(made.values.tolist(), made.events["rating"].tolist(),
                                  made.events["time_gap"].tolist(), strict=True):  # fmt: skip
        assert value == V or value == items[int(rating)]
        assert math.isnan(rating) == (value == V)
        assert math.isnan(rating) or gap == 100 * rating
    around = framed(made, [V + 1], [V + 2])
    ends = [*around.offsets[:-1].tolist(), *(around.offsets[1:] - 1).tolist()]
    assert all(around.events[name][ends].isnan().all() for name in COLUMNS)


def test_friends_bring_their_columns(dataset):
    graph = SocialGraph.from_pairs(np.array([[0, 7], [3, 9]]), dataset.num_users)
    side = Known(dataset, graph=graph, split="all")
    side.event_columns = COLUMNS
    side.shard = Shard(np.array([0, 3]), max_len=4)
    made = Friend(same_profile=False)(side.gather([0, 3], 4), Rng(0, 0), side)
    assert made.sample_ids.tolist() == [0, 3, 7, 9]
    expected = [event for user in (0, 3, 7, 9) for event in events_of(user)[-4:]]
    assert made.events["rating"].tolist() == [rating for _, rating, _ in expected]
    np.testing.assert_array_equal(made.events["time_gap"], [gap for _, _, gap in expected])


def two_views(dataset, **config):
    """CL4SRec on items with all parts: (model, objective, loader)."""
    model = model_with(dataset, encoder=Transformer(layers=1, causal=True), **config)
    side = SideData(dataset, event_columns=model.event_columns)
    objectives = {"item": Item(["main"]), "contrast": Contrast(["a", "b"])}
    view = [OneOf([Crop(), Mask(0.3, exact=True), Reorder()])]
    views = {"main": [NextItem()], "a": view, "b": view}
    objective = JointObjective(objectives, model, side)
    return model, objective, loader_of(model, views, side, batch_size=16)


def test_two_augmented_views_train_with_columns(dataset):
    model, objective, loader = two_views(dataset)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for step in range(30):
        loss = total_loss(objective(model, loader.batch_at(step), Rng(0, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    with torch.autocast("cpu", torch.bfloat16):
        low = total_loss(objective(model, loader.batch_at(0), Rng(0, 0)))
        assert model.item_input(loader.batch_at(0)["a"]).table.dtype == torch.float32
    full = total_loss(objective(model, loader.batch_at(0), Rng(0, 0)))
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


def test_a_batch_padded_for_a_graph_gives_the_same_losses(dataset):
    model, objective, loader = two_views(dataset)
    graphed = GraphedObjective(model, objective, 3, lambda losses, packs: losses)
    for step in range(3):
        views = loader.batch_at(step)
        expected = objective(model, views, Rng(3, step))
        for ours, theirs in zip(graphed(views, step), expected, strict=True):
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)


def test_a_default_device_changes_nothing(dataset, request):
    model, objective, loader = two_views(dataset)
    expected = loader.batch_at(0), total_loss(objective(model, loader.batch_at(0), Rng(0, 0)))
    torch.set_default_device("meta")
    request.addfinalizer(lambda: torch.set_default_device(None))
    fresh = SequenceDataset.load(dataset.path)
    columns = [fresh.event_column(name) for name in COLUMNS]
    made = item_categories(fresh, PARTS.most)
    assert made["genres"].table.device.type == "cpu" and len(columns) == 2
    elsewhere = model_with(fresh)
    assert {part.device.type for part in elsewhere.state_dict().values()} == {"meta"}
    loss = total_loss(objective(model, loader.batch_at(0), Rng(0, 0)))
    assert torch.equal(loss, expected[1])
    assert model.inputs_of([[1]]).events["rating"].device.type == "cpu"
