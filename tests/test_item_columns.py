# SPDX-License-Identifier: Apache-2.0
"""Columns of events and attributes of items, as the levels and categories that a model embeds."""

import math
import re
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from builders import (
    lists_of,
)
from catalogue import COLUMNS, GENRES, V, catalogue, events_of, raw_items

from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.item_categories import Categories, item_categories
from fastrec.data.prepare.writer import write_dataset
from fastrec.nn.item_parts import ItemAttribute, Rating, TimeGap
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return catalogue(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def dataset(folder):
    return SequenceDataset.load(folder / "data")


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


def test_levels_of_ratings():
    rating = Rating(1, 5, 0.5)
    given = torch.tensor([1, 1.24, 1.25, 3, 4.9, 5, math.nan, 0.8, 5.2])
    assert rating.levels == 9
    assert rating.level(given).tolist() == [0, 0, 1, 4, 8, 8, 9, 0, 8]
    assert Rating(0, 1, 0.1).level(torch.arange(11).float() / 10).tolist() == list(range(11))
    rating.check(given)
    ends = torch.tensor([0.75, 5.25])  # half a step from the lowest and the highest
    rating.check(ends)
    assert rating.level(ends).tolist() == [0, 8] == rating.level(torch.tensor([0.7, 9])).tolist()
    for wrong in (0, 0.74, 5.26, 7):
        with pytest.raises(ValueError, match=f"an event has the rating {wrong}, model.items.rati"):
            rating.check(np.array([3, wrong]))


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


def test_categories_without_an_item_are_refused():
    config = ModelConfig(items=Items(attributes={"a": ItemAttribute()}))
    with pytest.raises(ValueError, match=r"of at least one class, got \[30, 3\] and 0"):
        UserModel(V, config, item_features={"a": Categories.unknown(V, 3, 0)})
