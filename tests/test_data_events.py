# SPDX-License-Identifier: Apache-2.0
"""The events of a table: which columns are recognised, which rows are kept."""

import json

import polars as pl
import pytest
from files import fails, rows, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import prepare, readers

# Names of columns


@pytest.mark.parametrize(
    ("header", "recognised"),
    [
        ("userId,movieId,rating,timestamp", "userId movieId timestamp rating"),
        ("user_id,business_id,date,stars", "user_id business_id date stars"),
        ("reviewerID,asin,overall,unixReviewTime", "reviewerID asin unixReviewTime overall"),
        ("time,visitorid,event,itemid", "visitorid itemid time event"),
        ("User-ID,ISBN,Book-Rating,ts", "User-ID ISBN ts Book-Rating"),
        ("t_dat,customer_id,article_id,price", "customer_id article_id t_dat"),
    ],
)
def test_usual_names_are_recognised_and_said(tmp_path, header, recognised):
    names = recognised.split()
    values = ["3" if name in names[2:3] else "1" for name in header.split(",")]
    file = write(tmp_path / "t.csv", f"{header}\n{','.join(values)}\n")
    report = prepare(file, tmp_path / "d")
    assert [value for key, value in report.inferred.items() if key != "time_unit"] == names
    assert f"recognised: user_column {names[0]}, item_column {names[1]}" in str(report)
    assert SequenceDataset.load(tmp_path / "d").schema["inferred"] == report.inferred


def test_two_candidates_are_refused(tmp_path):
    text = "user_id,asin,parent_asin,time,date,score,stars,event,action\n1,2,3,4,4,5,6,a,b\n"
    file = write(tmp_path / "t.csv", text)
    options = {}
    for role, flag, first, second in (
        ("item", "item_column", "asin", "parent_asin"),
        ("timestamp", "timestamp_column", "time", "date"),
        ("rating", "rating_column", "score", "stars"),
        ("event_type", "event_type_column", "event", "action"),
    ):
        match = f"{first} and {second} may both hold the {role}: --{flag} says which"
        fails(readers.read_table, file, file=file, match=match, **options)
        options[role] = second
    raw = readers.read_table(file, **options)
    assert rows(raw) == [(1, 3, 4, 6.0, "b")] and raw.inferred == {"user_column": "user_id"}
    fewer = readers.read_table(file, **options | {"rating": "none", "event_type": "none"})
    assert rows(fewer) == [(1, 3, 4)]
    fails(readers.read_table, file, file=file, column="none", match="missing", user="none")


def test_a_column_of_times_is_never_ignored_in_silence(tmp_path):
    file = write(tmp_path / "t.csv", "user,item,time\n1,2,5\n1,3,4\n")
    fails(readers.read_table, file, file=file, column="time", row=3, match="back to 4",
          ordered=True)  # fmt: skip
    raw = readers.read_table(file, timestamp="none", ordered=True)
    assert rows(raw) == [(1, 2), (1, 3)]
    fails(readers.read_table, file, file=file, match="have no time", timestamp="none")
    write(file, "user,item,time\n1,2,evening\n")
    fails(readers.read_table, file, file=file, column="time", row=2, ordered=True,
          match="'evening'.*--timestamp_column none leaves it out")  # fmt: skip
    write(file, "user,item,time,score\n1,2,3,good\n")
    fails(readers.read_table, file, file=file, column="score", row=2,
          match="'good'; --rating_column none leaves it out")  # fmt: skip


def test_names_that_are_not_known(tmp_path):
    file = write(tmp_path / "t.csv", "who,what,time\n1,2,3\n")
    fails(readers.read_table, file, file=file, match="known to hold the user: --user_column names")
    fails(readers.read_table, file, file=file, match="the item.*there are who, what, time",
          user="who")  # fmt: skip
    write(file, "who;what;time\n1;2;3\n")
    fails(readers.read_table, file, file=file, match="between columns, perhaps ';'")
    write(file, "alice,book,2020/01/01\nbob,book,2020/01/02\n")
    fails(readers.read_table, file, file=file, match="if this first line is a row, --columns")
    write(file, "user, item,time\n1, 2,3\n")
    fails(readers.read_table, file, file=file, match="no column is known to hold the item")
    write(file, "user_id:token,item_id:token\n1,2\n")
    fails(readers.read_table, file, file=file, match="--format recbole reads such names")


# Rows

OPTION = st.sampled_from(["", "a", "b", "NA"])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(OPTION, OPTION, st.sampled_from(["", "7", "8"]), OPTION), max_size=8),
    st.booleans(),
    st.sampled_from([None, ["a"], ["a", "b"]]),
)
def test_rows_that_are_kept_are_those_of_a_plain_loop(tmp_path_factory, table, na, types):
    file = tmp_path_factory.mktemp("d") / "t.csv"
    write(file, "user,item,time,event\n" + "".join(",".join(row) + "\n" for row in table))
    missing = {"", "NA"} if na else {""}
    expected, removed = [], {}

    def count(reason):
        removed[reason] = removed.get(reason, 0) + 1

    known = {row[3] for row in table} >= set(types or [])
    for user, item, time, event in table:
        empty = [
            name for name, value in (("user", user), ("item", item), ("time", time))
            if value in missing
        ]  # fmt: skip
        if types is not None and event not in types:
            count(f"interactions whose event is not {' or '.join(types)}")
        elif empty:
            count(f"interactions without {empty[0]}")
        else:
            expected.append((user, item, int(time), event or None))
    options = {"on_missing": "drop", "on_duplicate": "keep", "keep_events": types}
    options["na_values"] = "missing" if na else "text"
    if not expected or not known:
        with pytest.raises(DataError):
            readers.read_table(file, **options)
        return
    raw = readers.read_table(file, **options)
    assert rows(raw) == expected
    assert raw.removed == removed


def test_missing_values_are_refused_with_their_number(tmp_path):
    file = write(tmp_path / "t.csv", "user,item,rating,time\n1,2,3,4\n,2,3,4\n1,2,,4\n,,3,4\n")
    fails(readers.read_table, file, file=file, column="user", row=3,
          match="missing, in 2 rows: --on_missing drop")  # fmt: skip
    report = prepare(file, tmp_path / "d", on_missing="drop")
    assert report.before["interactions"] == 4 and report.after["interactions"] == 1
    assert report.removed == {"interactions without user": 2, "interactions without rating": 1}
    write(file, "user,item,time\n1,,4\n")
    fails(readers.read_table, file, file=file, match="no row is left", on_missing="drop")
    with pytest.raises(ValueError, match="on_missing must be"):
        readers.read_table(file, on_missing="ask")


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Enum(["x", "", "NA", "y"])], ids=str)
def test_missing_ids_of_a_categorical_column(tmp_path, kind):
    file = tmp_path / "t.parquet"
    for lacks, options in (("", {}), ("NA", {"na_values": "missing"})):
        users = pl.Series("user", ["x", lacks, "y"]).cast(kind)
        table = pl.DataFrame({"user": users, "item": ["a", "b", "c"], "time": [1, 2, 3]})
        table.write_parquet(file)
        fails(readers.read_table, file, file=file, column="user", row=2, match="missing", **options)
        found = readers.read_table(file, on_missing="drop", **options)
        assert rows(found) == [("x", "a", 1), ("y", "c", 3)]


def test_rows_of_errors_are_those_of_the_file_where_some_are_dropped(tmp_path):
    text = "user,item,time,event\n,1,5,a\n1,2,5,b\n1,2,6,a\n2,,1,a\n{}\n"
    call = {"on_missing": "drop", "keep_events": ["a"]}
    for last, column, match in (
        ("1,3,soon,a", "time", "'soon'"),
        ("1,2,6,a", None, "first in row 4"),
        ("1,3,1e30,a", "time", "whole number"),
    ):
        file = write(tmp_path / "t.csv", text.format(last))
        fails(readers.read_table, file, file=file, column=column, row=6, match=match, **call)
    write(file, text.format("1,9,3,a"))
    fails(readers.read_table, file, file=file, column="time", row=6, match="back to 3",
          ordered=True, **call)  # fmt: skip


def test_types_of_events(tmp_path):
    file = write(tmp_path / "t.csv", "user,item,time,event\n1,2,3,view\n1,2,3,buy\n1,3,4,view\n")
    fails(readers.read_table, file, file=file, row=3, match="duplicate")
    assert rows(readers.read_table(file, keep_events=["buy"])) == [(1, 2, 3, "buy")]
    call = {"keep_events": ["buy", "sell"]}
    match = "no event is of type 'sell'; there are buy, view"
    fails(readers.read_table, file, file=file, column="event", match=match, **call)
    with pytest.raises(ValueError, match="--keep_events has no effect without"):
        readers.read_table(file, keep_events=["buy"], event_type="none")
    frame = pl.DataFrame({"user": [1, 1], "item": [2, 3], "time": [3, 4], "action": [0, 1]})
    lists = frame.with_columns(action=pl.Series([["a"], ["b"]]))
    fails(readers.read_table, lists, file="data frame", column="action", match="text or numbers")
    assert rows(readers.read_table(frame, keep_events=["1"])) == [(1, 3, 4, 1)]


def test_settings_without_an_effect(tmp_path):
    file = write(tmp_path / "t.csv", "user,item\n1,2\n1,2\n")
    for options, match in (
        ({"time_unit": "s"}, "--time_format and --time_unit have no effect without"),
        ({"time_format": "%Y"}, "--time_format and --time_unit have no effect without"),
        ({"on_duplicate": "drop"}, "--on_duplicate has no effect without times"),
    ):
        with pytest.raises(ValueError, match=match):
            readers.read_table(file, ordered=True, **options)
    for format, name in (("s3rec", "user"), ("recbole", "columns"), ("histories", "rating")):
        with pytest.raises(ValueError, match=f"--{name}.* has no effect on --format {format}"):
            readers.read(file, format, **{name: "x"})


def test_negative_ids_are_ids(tmp_path):
    file = write(tmp_path / "t.csv", "user,item,time\n-5,1,1\n3,-1,2\n")
    prepare(file, tmp_path / "d")
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_ids().tolist() == [-5, 3] and dataset.item_ids().tolist() == [-1, 1]


def test_the_preview_shows_events_as_they_were_understood(tmp_path):
    lines = "".join(f"u,{i},{1_700_000_000_500 + i},4.5,buy\n" for i in range(5))
    file = write(tmp_path / "t.csv", "user,item,time,stars,event\n" + lines)
    report = prepare(file, tmp_path / "d")
    first = "user 'u', item 0, time 2023-11-14 22:13:20.5, rating 4.5, event 'buy'"
    assert len(report.preview) == 3 and report.preview[0] == first
    assert f"begins with: {first}\n" in str(report)
    schema = json.loads((tmp_path / "d" / "schema.json").read_text())
    assert schema["time"] == "milliseconds since 1970" and schema["inferred"]["time_unit"] == "ms"
    write(file, "user,item,time\n" + "x" * 500 + ",1,7\n")
    report = prepare(file, tmp_path / "e")
    assert len(report.preview[0]) < 120 and report.preview[0].endswith("time 7")
    write(file, "user,item,time\n1,1,1969-12-31T23:59:59.5\n")
    assert prepare(file, tmp_path / "f").preview == ["user 1, item 1, time 1969-12-31 23:59:59.5"]


def test_events_that_were_read_take_no_options(tmp_path):
    frame = pl.DataFrame({"user_id": [1], "item_id": [1]})
    raw = readers.RawData("here", frame, ordered=True)
    with pytest.raises(ValueError, match="user have no effect on events that have been read"):
        prepare(raw, tmp_path / "d", user="x")
