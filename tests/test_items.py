# SPDX-License-Identifier: Apache-2.0
"""The input of items beside their ids: attributes, ratings and time gaps, one event at a time in
plain Python; from a csv file to recommendations."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from builders import (
    Killed,
    Known,
    assert_same_weights,
    killed_at,
    lists_of,
    loader_of,
    model_of,
)
from safetensors.torch import load_file, save_file

from fastrec.cli import main
from fastrec.data.batch import JaggedBatch, framed, from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.graph import SocialGraph
from fastrec.data.item_categories import Categories, item_categories
from fastrec.data.prepare import prepare
from fastrec.data.prepare.writer import write_dataset
from fastrec.data.side import Shard, SideData
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.reorder import Reorder
from fastrec.evaluation.next_item import next_item_queries
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_parts import ItemAttribute, Rating, TimeGap
from fastrec.nn.items import Items
from fastrec.nn.layouts import bert_state
from fastrec.nn.model_config import ModelConfig, parameters
from fastrec.nn.model_files import write_digests
from fastrec.nn.user_model import UserModel
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.serve import recommend
from fastrec.training.graphed import GraphedObjective

V = 30
GENRES = {"drama": 0, "noir": 1, "opera": 2, "war": 3}
PARTS = Items(
    attributes={"genres": ItemAttribute(width=3, most=2), "brand": ItemAttribute(width=5, most=1)},
    rating=Rating(1, 5, 0.5, width=4),
    time_gap=TimeGap(width=6),
)
COLUMNS = ["rating", "time_gap"]


def raw_rows() -> list[tuple[int, int, int, float]]:
    """(user, item, second, rating) in no order: 61 users, gaps from 0 to months, equal times."""
    generator = np.random.default_rng(4)
    rows = []
    for user in range(60):
        second = int(generator.integers(10**9, 2 * 10**9))
        for _ in range(int(generator.integers(2, 16))):
            item = int(generator.integers(V))
            rows.append((user, item, second, float(generator.integers(2, 11)) / 2))
            second += int(2 ** generator.uniform(0, 24)) - 1
    rows += [(60, item, 7 + item, 3.0) for item in range(V)]  # every item has an event
    return [rows[place] for place in generator.permutation(len(rows))]


def raw_items() -> dict[int, tuple[list[str] | None, str | None]]:
    """(genres, brand) by item."""
    generator, found = np.random.default_rng(5), {}
    for item in range(V):
        names = generator.permutation(list(GENRES))[: generator.integers(0, 4)].tolist()
        found[item] = (names or None, [None, "acme", "zeta"][int(generator.integers(3))])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set with times, ratings and attributes of items, prepared from csv."""
    folder = tmp_path_factory.mktemp("items")
    table = pl.DataFrame(raw_rows(), schema=["u", "i", "at", "stars"], orient="row")
    table.write_csv(folder / "log.csv")
    items = raw_items()
    pl.DataFrame(
        {
            "item_id": list(items),
            "genres": [genres for genres, _ in items.values()],
            "brand": [brand for _, brand in items.values()],
            "price": [float(item) for item in items],
        },
    ).write_parquet(folder / "items.parquet")
    main(
        ["prepare", f"--source={folder / 'log.csv'}", f"--output={folder / 'data'}",
         "--format=table", "--user_column=u", "--item_column=i", "--timestamp_column=at",
         "--rating_column=stars", f"--item_attributes={folder / 'items.parquet'}",
         "--on_duplicate=keep"]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return SequenceDataset.load(folder / "data")


def model_with(dataset, items: Items = PARTS, num_items: int = V, **config) -> UserModel:
    torch.manual_seed(2)
    encoder = config.pop("encoder", Transformer(layers=1))
    settings = ModelConfig(**{"width": 8, "max_len": 10, "dropout": 0.3, **config}, items=items,
                           encoder=encoder)  # fmt: skip
    return UserModel(num_items, settings, item_features=item_categories(dataset, items.most))


# Columns of events.


def events_of(user: int) -> list[tuple]:
    """(item, rating, gap) of a user, in time order, from the raw rows."""
    rows = sorted((r for r in raw_rows() if r[0] == user), key=lambda row: row[2])
    befores = [None, *rows]
    return [
        (row[1], row[3], math.nan if before is None else float(row[2] - before[2]))
        for before, row in zip(befores, rows, strict=False)
    ]


def test_columns_are_those_of_the_events_in_every_split_and_cut(dataset):
    cut = {"train": 2, "valid": 2, "test": 1, "all": 0}
    for split, hidden in cut.items():
        users = dataset.users(split)
        for max_len in (None, 3, 0):
            batch = dataset.gather(users, split, max_len, columns=COLUMNS)
            rows = zip(lists_of(batch), *(lists_of(batch, batch.events[n]) for n in COLUMNS),
                       strict=True)  # fmt: skip
            for user, (items, ratings, gaps) in zip(users, rows, strict=True):
                expected = events_of(user)
                expected = expected[: len(expected) - hidden * (len(expected) >= 3)]
                kept = len(expected) if max_len is None else max_len
                expected = expected[max(0, len(expected) - kept) :]
                assert [e[0] for e in expected] == items
                assert [e[1] for e in expected] == ratings
                np.testing.assert_array_equal([e[2] for e in expected], gaps)
    assert batch.events["rating"].dtype == torch.float32
    assert batch.events["time_gap"].dtype == torch.float64
    assert dataset.gather([0], "all").events == {}


def written(path, time: str, rating: bool = True, stamps=(5, 5, 20, 7, 1_000_000_006)):
    """Two users with three and two events, and one without any between them."""
    columns = {"user": [0, 0, 0, 2, 2], "item": [0, 1, 1, 0, 1], "timestamp": list(stamps)}
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.Int64))
    if rating:
        frame = frame.with_columns(pl.Series("rating", [1, None, 3, 4, 5], dtype=pl.Float32))
    write_dataset(
        path, interactions=frame, users=pl.DataFrame({"user_id": [1, 2, 3]}),
        items=pl.DataFrame({"item_id": [1, 2]}), tie_rule="none", time=time, source="test",
    )  # fmt: skip
    return SequenceDataset.load(path)


@pytest.mark.parametrize(
    "time, per_second",
    [
        ("timestamp of the source", 1),
        ("seconds since 1970", 1),
        ("microseconds since 1970", 10**6),
        ("nanoseconds since 1970", 10**9),
    ],
)
def test_gaps_are_seconds_whatever_a_timestamp_counts(tmp_path, time, per_second):
    data = written(tmp_path / "d", time)
    expected = [math.nan, 0, 15 / per_second, math.nan, 999_999_999 / per_second]
    np.testing.assert_array_equal(data.event_column("time_gap"), expected)
    np.testing.assert_array_equal(data.event_column("rating"), [1, math.nan, 3, 4, 5])
    assert data.event_column("rating") is data.event_column("rating"), "read once"


def test_a_column_that_the_data_set_has_not_is_an_error_that_names_the_file(tmp_path):
    data = written(tmp_path / "a", "place in the sequence, from 0", rating=False)
    with pytest.raises(DataError, match=r"schema\.json: the data set has no times: a time gap"):
        data.gather([0], "all", columns=["time_gap"])
    with pytest.raises(DataError, match=r"interactions\.parquet: the data set has no ratings: "):
        data.event_column("rating")
    with pytest.raises(ValueError, match=r"events have the columns \['rating', 'time_gap'\], got"):
        data.event_column("price")
    with pytest.raises(DataError, match=r"has times of unknown unit \('row'\)"):
        written(tmp_path / "b", "row").event_column("time_gap")
    with pytest.raises(DataError, match=r"column 'timestamp', row 3: times of a user fall"):
        written(tmp_path / "c", "seconds since 1970", stamps=(5, 6, 4, 1, 2)).event_column(
            "time_gap"
        )
    other = written(tmp_path / "d", "seconds since 1970")
    file = other.path / "interactions.parquet"
    file.write_bytes((tmp_path / "c" / "interactions.parquet").read_bytes())
    for name in COLUMNS:
        with pytest.raises(DataError, match=r"interactions\.parquet: is not the file that was wri"):
            other.event_column(name)
    file.unlink()
    with pytest.raises(DataError, match="file is missing: the events have no rating"):
        other.event_column("rating")


# Categories of items.


def test_categories_are_numbered_in_order_and_a_long_list_is_cut(dataset):
    found = item_categories(dataset, {"genres": 2, "brand": 1})
    assert {name: each.classes for name, each in found.items()} == {"genres": 4, "brand": 2}
    for item, (genres, brand) in raw_items().items():
        expected = [GENRES[name] for name in genres or []][:2]
        assert found["genres"].table[item].tolist() == expected + [-1] * (2 - len(expected))
        assert found["brand"].table[item].tolist() == [{None: -1, "acme": 0, "zeta": 1}[brand]]


def test_categories_of_any_type_and_what_is_none(tmp_path):
    frame = pl.DataFrame(
        {
            "item": [0, 1, 2],
            "item_id": [5, 6, 7],
            "count": [7, None, -3],
            "flag": [True, True, False],
            "kind": pl.Series(["b", "a", None], dtype=pl.Categorical),
            "tags": [[3, None, 3, 9], [], [9]],
            "price": [1.0, 2.0, 3.0],
            "empty": pl.Series([None, None, None], dtype=pl.String),
        }
    )
    data = SimpleNamespace(item_attributes=lambda: frame, path=tmp_path)
    found = item_categories(data, {"count": 1, "flag": 1, "kind": 1, "tags": 3})
    tables = {name: each.table.tolist() for name, each in found.items()}
    assert tables == {
        "count": [[1], [-1], [0]],
        "flag": [[1], [1], [0]],
        "kind": [[1], [0], [-1]],
        "tags": [[0, 1, -1], [-1, -1, -1], [1, -1, -1]],
    }
    for name, message in (
        ("price", r"column 'price': Float64 holds no categories"),
        ("empty", r"column 'empty': no item has a category"),
        ("director", r"column 'director': column is missing; the attributes are \['count', 'fl"),
    ):
        with pytest.raises(DataError, match=r"items\.parquet: " + message):
            item_categories(data, {name: 1})


# Levels.


def test_levels_of_ratings():
    rating = Rating(1, 5, 0.5)
    given = torch.tensor([1, 1.24, 1.25, 3, 4.9, 5, math.nan, 0.8, 5.2])
    assert rating.levels == 9
    assert rating.level(given).tolist() == [0, 0, 1, 4, 8, 8, 9, 0, 8]
    assert Rating(0, 1, 0.1).level(torch.arange(11).float() / 10).tolist() == list(range(11))
    rating.check(given)
    with pytest.raises(ValueError, match="an event has the rating 0, model.items.rating has"):
        rating.check(np.array([3, 0, 7]))


def test_levels_of_gaps_are_whole_logarithms_of_base_two():
    seconds = sorted({2**k + shift for k in range(40) for shift in (-2, -1, 0)} - {-1})
    expected = [(1 + s).bit_length() - 1 for s in seconds]
    assert TimeGap().level(torch.tensor(seconds, dtype=torch.float64)).tolist() == expected
    odd = torch.tensor([math.nan, 2.0**70, 2.5, 0.999999], dtype=torch.float64)
    assert TimeGap().level(odd).tolist() == [64, 63, 1, 0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rating(5, 1), "low must be below high and step above 0, got 5, 1, 1.0"),
        (lambda: Rating(1, 5, 0.7), "step 0.7 does not lead from 1 to 5"),
        (lambda: Rating(0, 1e6, 1), "step makes 1000001 levels, expected at most 10000"),
        (lambda: TimeGap(width=0), "width must be at least 1, got 0"),
        (lambda: ItemAttribute(most=0), "most must be at least 1, got 0"),
        (lambda: Items(combine="sum"), "combine has no effect: items have neither attributes"),
        (lambda: Items(combine="mean"), "combine must be one of ['concat', 'sum'], got 'mean'"),
        (
            lambda: ModelConfig(items=Items(attributes={"a": ItemAttribute()}, combine="sum")),
            "model.items.attributes.a.width is 16: combine: sum adds vectors of model.width, 64",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# The input.


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


def summed(scale: bool = False) -> Items:
    return Items(
        scale=scale, combine="sum", attributes={"genres": ItemAttribute(8)}, rating=Rating(width=8),
        time_gap=TimeGap(8),
    )  # fmt: skip


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


# Steps.


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
    batch = batch_with_columns()
    before = {name: column.clone() for name, column in batch.events.items()}
    made = step(batch, Rng(1, 2), side_of(batch))
    chosen = made.events["target"] != -100
    assert 4 <= chosen.sum() < len(batch.values)
    assert torch.equal(made.events["rating"].isnan(), chosen)
    assert torch.equal(made.events["rating"][~chosen], before["rating"][~chosen])
    assert torch.equal(made.events["time_gap"], before["time_gap"])
    assert all(torch.equal(batch.events[name], before[name]) for name in before)


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


# Files.


@pytest.mark.parametrize("items", [PARTS, summed(), Items(time_gap=TimeGap())])
def test_a_saved_model_needs_no_data_set(dataset, tmp_path, items):
    model = model_with(dataset, items)
    model.save_pretrained(tmp_path)
    again = UserModel.from_pretrained(tmp_path)
    batch = model.inputs(dataset, [1, 2, 3], "all", ask=True)
    assert torch.equal(model.encode(batch).states, again.encode(batch).states)
    assert again.config == model.config
    said = json.loads((tmp_path / "config.json").read_text())
    counts = {"genres": 4, "brand": 2}
    expected = {name: counts[name] for name in items.attributes}
    assert said.get("item_classes", {}) == expected == again.item_input.classes
    numbers = sum(part.numel() for part in load_file(tmp_path / "model.safetensors").values())
    assert parameters(V, model.config, item_sizes=expected) == numbers


def test_a_model_that_was_saved_before_there_were_parts_is_read(tmp_path):
    model_of(num_items=11).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert "item_classes" not in values
    values["items"] = {"scale": False}
    file.write_text(json.dumps(values))
    write_digests(tmp_path)
    assert UserModel.from_pretrained(tmp_path).config == model_of(num_items=11).config


def test_a_folder_that_does_not_fit_is_refused_by_name(dataset, tmp_path):
    model_with(dataset).save_pretrained(tmp_path)
    file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole, state = json.loads(file.read_text()), load_file(weights)
    for change, message in (
        ({"item_classes": {"genres": 4}}, "item_classes must be the categories of ['genres', 'bra"),
        ({"item_classes": None}, "item_classes must be the categories of ['genres', 'brand'], got"),
        ({"item_classes": {"genres": 0, "brand": 2}}, "item_classes must be the categories of"),
        ({"item_classes": {"genres": 10**12, "brand": 2}}, "it describes a model of 300000000"),
    ):
        file.write_text(json.dumps(whole | change))
        write_digests(tmp_path)
        with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
            UserModel.from_pretrained(tmp_path)
    file.write_text(json.dumps(whole))
    for wrong in (4, -2):
        table = state["item_input.attributes.0.table"].clone()
        table[5, 1] = wrong
        save_file(state | {"item_input.attributes.0.table": table}, weights)
        write_digests(tmp_path)
        with pytest.raises(ValueError, match=r"safetensors: the table of 'genres' has categories"):
            UserModel.from_pretrained(tmp_path)


# The command line.

RECIPE = """
base: cl4srec
model:
  width: 16
  max_len: 10
  encoder: {transformer: {layers: 1}}
  items:
    attributes: {genres: {width: 4, most: 2}, brand: {width: 4, most: 1}}
    rating: {low: 1, high: 5, step: 0.5, width: 4}
    time_gap: {width: 4}
pretraining: {steps: 6, batch_size: 20, validate_every: 3, checkpoint_every: 2, warmup_steps: 0}
"""


@pytest.fixture(scope="module")
def trained(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    main(["pretrain", f"--config={folder / 'recipe.yaml'}", f"--data={folder / 'data'}",
          f"--output={folder / 'run'}"])  # fmt: skip
    return folder


def test_a_model_with_parts_is_evaluated_asked_and_embedded(trained, dataset, tmp_path):
    model = UserModel.from_pretrained(trained / "run" / "model")
    assert model.item_input.classes == {"genres": 4, "brand": 2}
    asked = [f"--data={trained / 'data'}", f"--pretrained={trained / 'run' / 'model'}"]
    main(["evaluate", f"--config={trained / 'recipe.yaml'}", *asked,
          f"--output={tmp_path / 'metrics.json'}"])  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text())["users"] > 50
    main(["recommend", *asked, f"--output={tmp_path / 'best.csv'}", "--k=3", "--seen=none"])
    main(["embed", *asked, f"--output={tmp_path / 'users.parquet'}"])
    assert pl.read_parquet(tmp_path / "users.parquet").height == 61
    frame = pl.read_csv(tmp_path / "best.csv")
    users = torch.arange(dataset.num_users)
    query = next_item_queries(model, dataset, users, "all")
    best = (query @ model.item_table.T + model.item_head.bias).topk(3).indices
    assert frame["item_id"].to_list() == dataset.item_ids()[best.flatten().numpy()].tolist()
    # What else is known of the events is read: without it other items come first.
    alone = recommend(model, dataset, 3, seen="none", histories=[
        dataset.item_ids()[dataset.gather([user], "all").values.numpy()].tolist()
        for user in users.tolist()])  # fmt: skip
    assert alone["score"].to_list() != frame["score"].to_list()


def test_a_killed_run_with_parts_resumes_bit_for_bit(trained, tmp_path, monkeypatch):
    arguments = ["pretrain", f"--config={trained / 'recipe.yaml'}", f"--data={trained / 'data'}",
                 f"--output={tmp_path / 'run'}"]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "training_step", 5)
        main(arguments)
    main([*arguments, "--resume=true"])
    assert_same_weights(trained / "run", tmp_path / "run")
    said = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert {"rating", "time_gap"} <= said.keys(), "other ratings are another run"


def test_data_that_a_recipe_does_not_fit_ends_in_an_error_before_a_run(trained, tmp_path, capsys):
    def message(*flags, data=trained / "data") -> str:
        with pytest.raises((SystemExit, ValueError)) as error:
            main(["pretrain", f"--config={trained / 'recipe.yaml'}", f"--data={data}",
                  f"--output={tmp_path / 'run'}", *flags])  # fmt: skip
        assert not (tmp_path / "run" / "last.ckpt").exists()
        return str(error.value) + capsys.readouterr().err

    assert "model.items.rating has the levels 3 to 5" in message("--model.items.rating.low=3")
    assert "the attributes are ['genres', 'brand', 'price']" in message(
        "--model.items.attributes.director.width=4"
    )
    (tmp_path / "plain.txt").write_text("1 1 2 3 4\n2 4 3 2 1\n3 1 2 3 4\n")
    prepare(tmp_path / "plain.txt", tmp_path / "plain", format="s3rec")
    assert "the data set has no" in message(data=tmp_path / "plain")


def test_categories_without_an_item_are_refused():
    config = ModelConfig(items=Items(attributes={"a": ItemAttribute()}))
    with pytest.raises(ValueError, match=r"of at least one class, got \[30, 3\] and 0"):
        UserModel(V, config, item_features={"a": Categories.unknown(V, 3, 0)})
