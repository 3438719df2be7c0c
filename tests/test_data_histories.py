# SPDX-License-Identifier: Apache-2.0
"""A row per user: lists of items as text, JSON or columns, and users in several rows."""

import json

import polars as pl
import pytest
from files import fails, rows, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import prepare, readers

MIND = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN5 N4 N3\tN9-1 N8-0\n"
    "2\tU2\t11/12/2019 6:11:30 PM\tN3\tN9-0\n"
    "3\tU1\t11/14/2019 7:01:48 AM\tN5 N4 N3\tN7-0\n"
)
NAMES = ["impression", "user", "time", "history", "shown"]


def test_mind(tmp_path):
    file = write(tmp_path / "behaviors.tsv", MIND)
    report = prepare(file, tmp_path / "d", format="histories", columns=NAMES)
    assert report.after == {"users": 2, "items": 3, "interactions": 4}
    assert report.removed == {"interactions in 1 histories of known users that say nothing new": 3}
    assert report.inferred == {
        "user_column": "user",
        "history_column": "history",
        "ignored": "time (the items of a history are in its order)",
        "history": "between blanks",
    }
    dataset = SequenceDataset.load(tmp_path / "d")
    items = dataset.item_ids()[dataset.values].tolist()
    assert items == ["N5", "N4", "N3", "N3"] and dataset.schema["tie_rule"].startswith("order of")


@pytest.mark.parametrize(
    ("text", "how"),
    [("7 8 9", "between blanks"), (" 7\t8  9 ", "between blanks"), ("7,8 , 9", "between commas"),
     ("[7, 8, 9]", "JSON lists")],
)  # fmt: skip
def test_ways_to_write_a_list(tmp_path, text, how):
    file = write(tmp_path / "t.dat", f"user|items\n1|{text}\n2|{text}\n")
    raw = readers.read_histories(file, separator="|")
    assert rows(raw) == [(user, item) for user in (1, 2) for item in (7, 8, 9)]
    assert raw.ordered and raw.inferred["history"] == how


def test_lists_of_typed_columns(tmp_path):
    frame = pl.DataFrame({"user": ["a", "b"], "items": [[1, 2], [3]]})
    assert rows(readers.read_histories(frame)) == [("a", 1), ("a", 2), ("b", 3)]
    frame.write_parquet(tmp_path / "t.parquet")
    assert rows(readers.read_histories(tmp_path / "t.parquet")) == [("a", 1), ("a", 2), ("b", 3)]
    array = frame.with_columns(items=pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)))
    assert len(rows(readers.read_histories(array))) == 4
    text = "\n".join(json.dumps(row) for row in frame.to_dicts())
    assert len(rows(readers.read_histories(write(tmp_path / "t.jsonl", text)))) == 3
    numbers = frame.with_columns(items=pl.Series([1, 2]))
    fails(readers.read_histories, numbers, file="data frame", column="items",
          match="expected lists or text, got Int64")  # fmt: skip


LISTS = st.lists(st.sampled_from("xyz"), max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from("ab"), LISTS), min_size=1, max_size=6), st.booleans())
def test_the_longest_history_of_a_user_counts(tmp_path_factory, table, typed):
    longest, odd = {}, False
    for user, items in table:
        if len(items) >= len(longest.get(user, [])):
            longest[user] = items
    odd = any(longest[user][: len(items)] != items for user, items in table)
    used = []
    for place, (user, items) in enumerate(table):
        last = max(i for i, row in enumerate(table) if row == (user, longest[user]))
        used += [(user, item) for item in items] if place == last else []
    frame = pl.DataFrame(
        {"user": [user for user, _ in table], "items": [items for _, items in table]},
        schema_overrides={"items": pl.List(pl.String)},
    )
    if not typed:
        frame = frame.with_columns(pl.col("items").list.join(" "))
    options = {"on_missing": "drop"}
    if odd:
        with pytest.raises(DataError, match="has several histories"):
            readers.read_histories(frame, **options)
        options["on_duplicate"] = "drop"
    if not used:
        with pytest.raises(DataError, match="no row is left"):
            readers.read_histories(frame, **options)
        return
    raw = readers.read_histories(frame, **options)
    assert rows(raw) == used
    empty = sum(not items for items in longest.values())
    total = sum(len(items) for _, items in table) + empty
    assert sum(raw.removed.values()) + len(used) == total


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ("1,a b\n2,\n", "items", 3, "missing, here alone: --on_missing drop"),
        ("1,a b\n,c\n", "user", 3, "missing"),
        ("1,a b\n1,a c d\n", "user", 2, "user '1' has several histories"),
        ("1,a NA\n", "items", 2, "looks like a missing id"),
        ('1,"a,b"\n2,"c,d e"\n', "items", 3, "commas and blanks"),
        ('1,"a,,b"\n', "items", 2, "missing"),
        ('1,[1]\n2,"[1, 2"\n', "items", 3, "is not JSON"),
        ('1,[1]\n2,"[1, [2]]"\n', "items", 3, "expected a list of ids"),
        ('1,[1]\n2,"[1, null]"\n', "items", 3, "expected a list of ids"),
        ('1,"[1, 2]"\n2,5\n3,"[2,1]"\n', "items", 3, "expected a list of ids, got '5'"),
        ('1,"[1, 2]"\n2,null\n', "items", 3, "expected a list of ids, got 'null'"),
        ('1,"a, b"\n2,"[2,1]"\n', "items", 2, "is not JSON"),
    ],
)
def test_bad_histories(tmp_path, text, column, row, match):
    file = write(tmp_path / "t.csv", "user,items\n" + text)
    fails(readers.read_histories, file, file=file, column=column, row=row, match=match)


@pytest.mark.parametrize("text", ['1,"[1, 2]"\n2,null\n3,[2]\n', "1,1 2\n2,NaN\n3,2\n"])
def test_a_word_for_a_missing_history(tmp_path, text):
    file = write(tmp_path / "t.csv", "user,items\n" + text)
    found = readers.read_histories(file, na_values="missing", on_missing="drop")
    assert rows(found) == [(1, 1), (1, 2), (3, 2)]


def test_settings_of_histories(tmp_path):
    file = write(tmp_path / "t.csv", "user,list\n1,a b\n")
    fails(readers.read_histories, file, file=file, match="--history_column names it")
    assert rows(readers.read_histories(file, history="list")) == [(1, "a"), (1, "b")]
    with pytest.raises(ValueError, match="keep has no effect on histories"):
        readers.read_histories(file, history="list", on_duplicate="keep")
    with pytest.raises(ValueError, match="--timestamp_column has no effect on --format histories"):
        prepare(file, tmp_path / "d", format="histories", timestamp="time")
