# SPDX-License-Identifier: Apache-2.0
"""Tables of any origin and attribute files: what is read, and that bad input is reported with file,
column and row."""

import datetime
import gzip
import json

import polars as pl
import pyarrow as pa
import pytest
from files import fails, rows, write
from pyarrow import parquet

from fastrec.data.prepare import readers
from fastrec.data.prepare.side_tables import read_attributes

NAMES = {"user": "who", "item": "what", "timestamp": "when"}


def test_csv_quotes_and_column_names(tmp_path):
    text = 'what,who,when,stars\n"a,1",7,2020-01-02,4\n"b ""q""",8,2020-01-01,2.5\n'
    file = write(tmp_path / "t.csv", text)
    raw = readers.read(file, "table", rating="stars", **NAMES)
    day = 86_400_000_000
    start = (datetime.date(2020, 1, 1) - datetime.date(1970, 1, 1)).days * day
    assert rows(raw) == [(7, "a,1", start + day, 4.0), (8, 'b "q"', start, 2.5)]


@pytest.mark.parametrize("ids", ["007", "+7", "7.0"])
def test_text_that_only_looks_like_an_integer_stays_text(tmp_path, ids):
    file = write(tmp_path / "t.csv", f"who,what,when\n{ids},1,2\n7,1,2\n")
    assert [row[0] for row in rows(readers.read_table(file, **NAMES))] == [ids, "7"]
    call = readers.read_table
    fails(
        call, file, file=file, column="who", row=2, match=ids.replace("+", "."), ids="int", **NAMES
    )


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ("who,when\n1,2\n", "what", None, "there are who, when"),
        ("who,what,when\n1,2,3\n1,,4\n", "what", 3, "missing"),
        ("who,what,when\n1,2,3\n1,2,soon\n", "when", 3, "'soon'"),
        ("who,what,when\n1,2,2020-01-01\n1,2,2020-13-01\n", "when", 3, "2020-13-01"),
        ("who,what,when\n1,2,inf\n", "when", 2, "'inf'"),
        ("who,what,when\n1,2,3\n1,2\n", None, 3, "expected 3 fields, got 2"),
        ('who,what,when\n"1,1",2,3\n1,"2,2"\n', None, 3, "expected 3 fields, got 2"),
        ("who,what,when\n1,2,\n", "when", 2, "missing"),
        ("who,what,when\n1,2,1e30\n", "when", 2, "expected a whole number .*, got '1e30'"),
        ("who,what,when\n1,2,3\n1,2,3,4\n", None, 3, "expected 3 fields"),
        ("who,what,when\n", None, None, "no rows"),
    ],
)
def test_csv_bad_input(tmp_path, text, column, row, match):
    file = write(tmp_path / "t.csv", text)
    fails(readers.read_table, file, file=file, column=column, row=row, match=match, **NAMES)


def test_order_is_checked_where_it_is_promised(tmp_path):
    file = write(tmp_path / "t.csv", "who,what,when\n1,2,5\n2,2,3\n1,4,5\n1,5,4\n")
    raw = readers.read_table(file, on_duplicate="keep", **NAMES)
    assert [row[2] for row in rows(raw)] == [5, 3, 5, 4] and not raw.ordered
    fails(
        readers.read_table, file, file=file, column="when", row=5, match="user 1.*back to 4",
        ordered=True, **NAMES,
    )  # fmt: skip
    with pytest.raises(ValueError, match="--timestamp_column.* or say --ordered true"):
        readers.read_table(file, user="who", item="what")
    kept = readers.read_table(file, user="who", item="what", ordered=True)
    assert kept.ordered and kept.interactions.columns == ["user_id", "item_id"]


def test_parquet_bad_input(tmp_path):
    file = tmp_path / "t.parquet"
    good = pl.DataFrame({"who": [1, 2], "what": [3, 4], "when": [5, 6], "stars": [1.0, 2.0]})
    read, options = readers.read_table, {"rating": "stars", **NAMES}

    def bad(column, values, row, match):
        good.with_columns(pl.Series(column, values)).write_parquet(file)
        fails(read, file, file=file, column=column, row=row, match=match, **options)

    bad("stars", [1.0, float("nan")], 2, "nan")
    bad("stars", [None, 1.0], 1, "missing")
    bad("stars", [[1.0], [2.0]], None, "expected numbers")
    bad("who", [1.5, 2.5], None, "integers or text")
    bad("what", [None, 2], 1, "missing")
    bad("when", [1.0, 2.5], 2, "whole")
    bad("when", [True, False], None, "expected times")
    times = pa.array([0, 1], pa.timestamp("us", tz="+05:30"))  # Polars cannot make or read it
    parquet.write_table(pa.table({"who": [1, 2], "what": [3, 4], "when": times}), file)
    fails(read, file, file=file, column="when", match=r"time zone \+05:30 has no name", **NAMES)
    for zone in ("+00:00", "-03:00", "UTC", "Asia/Kolkata"):
        times = pa.array([0, 1], pa.timestamp("us", tz=zone))
        parquet.write_table(pa.table({"who": [1, 2], "what": [3, 4], "when": times}), file)
        assert [row[2] for row in rows(read(file, **NAMES))] == [0, 1]
    good.write_parquet(file)
    data = file.read_bytes()
    packed = tmp_path / "t.parquet.gz"
    packed.write_bytes(gzip.compress(data))
    assert rows(read(packed, **options)) == rows(read(file, **options))
    for cut in (len(data) - 5, len(data) // 2, 3):
        file.write_bytes(data[:cut])
        fails(read, file, file=file, match="Parquet", **options)
    file.write_bytes(b"")
    fails(read, file, file=file, match="Parquet", **options)
    good.clear().write_parquet(file)
    fails(read, file, file=file, match="no rows", **options)
    fails(read, tmp_path / "no.parquet", file=tmp_path / "no.parquet", match="missing", **options)


def test_json_lines(tmp_path):
    lines = [{"who": "a", "what": "x", "when": "2020-01-01 00:00:00", "other": {"deep": [1]}}]
    file = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    assert rows(readers.read_table(file, **NAMES))[0][:2] == ("a", "x")
    write(file, json.dumps(lines[0]) + '\n{"who": "b", "wh')
    fails(readers.read_table, file, file=file, row=2, match="JSON", **NAMES)


def test_attribute_tables(tmp_path):
    file = write(tmp_path / "a.csv", "user,age,note,score\n3,20,x,1.5\n1,,7y,2\n")
    frame = read_attributes(file, "user_id")
    assert frame.columns == ["user_id", "age", "note", "score"]
    assert frame.rows() == [(3, 20, "x", 1.5), (1, None, "7y", 2.0)]
    ids = write(tmp_path / "map.txt", "1 3\n2 8\n")
    assert read_attributes(file, "user_id", id_map=ids).rows() == [(1, 20, "x", 1.5)]
    write(file, "user,age\n3,20\n3,21\n")
    fails(read_attributes, file, "user_id", file=file, column="user", row=3, match="twice")


def test_attribute_rows_that_are_short_or_hold_nothing(tmp_path):
    file = write(tmp_path / "a.csv", "user_id,age,city\n1,30,x\n2,31\n")
    fails(read_attributes, file, "user_id", file=file, row=3, match="expected 3 fields, got 2")
    file = write(tmp_path / "users.dat", "1::F::::3::x\n2::M::25::4::y\n")
    assert read_attributes(file, "user_id").rows() == [
        (1, "F", None, 3, "x"), (2, "M", 25, 4, "y"),
    ]  # fmt: skip


def test_numbers_beyond_64_bits(tmp_path):
    for name in ("who", "when"):
        columns = {"who": [1, 1], "what": [1, 2], "when": [1, 2]}
        frame = pl.DataFrame(columns | {name: pl.Series([1, 2**63], dtype=pl.UInt64)})
        frame.write_parquet(tmp_path / "t.parquet")
        fails(
            readers.read_table, tmp_path / "t.parquet", file=tmp_path / "t.parquet", column=name,
            row=2, match="9223372036854775808 is beyond 64 bits", **NAMES,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ('{"1": [2], "2": [3', None, 1, "JSON"),
        ("[1, 2]", None, None, "object"),
        ('{"a": [1]}', "item_id", None, "'a'"),
        ('{"1": ["x"]}', "attributes", None, "list of integers"),
        ('{"1": 3}', "attributes", None, "list of integers"),
        ('{"1": [1], "2": [2], "1": [3]}', "item_id", None, "id 1 is listed twice"),
    ],
)
def test_bad_attribute_json(tmp_path, text, column, row, match):
    file = write(tmp_path / "bad.json", text)
    call = read_attributes
    fails(call, file, "item_id", file=file, column=column, row=row, match=match)


def test_format_and_separator_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="format must be one of"):
        readers.read(tmp_path, "csv")
    file = write(tmp_path / "t.log", "who;what;when\n1;2;3\n")
    with pytest.raises(ValueError, match="separator"):
        readers.read_table(file, **NAMES)
    assert rows(readers.read_table(file, separator=";", **NAMES)) == [(1, 2, 3)]
    file = write(tmp_path / "t.csv", "who;what;when\na;2;3\n")
    fails(readers.read_table, file, file=file, column="who", match="--separator", **NAMES)
    write(file, 'who;what;when\n"a;b";"2";3\n')
    assert rows(readers.read_table(file, separator=";", **NAMES)) == [("a;b", 2, 3)]
    file = write(tmp_path / "t.log", "who\twhat\twhen\n1\t2\t3\n")
    assert rows(readers.read_table(file, separator="\\t", **NAMES)) == [(1, 2, 3)]
    with pytest.raises(ValueError, match="--separator cannot be"):
        readers.read_table(file, separator='"', **NAMES)


@pytest.mark.parametrize(
    ("text", "row", "match"),
    [
        # The csv module stops at a field of 131,072 characters.
        ('who,what,when\n1,"{long}",3\n1,2\n', 3, "expected 3 fields, got 2"),
        ('who,what,when\n1,"a,b",3\n1,"c\nd",4\n1,2,3,4\n', 4, "expected 3 fields, got 4"),
        ('who,what,when\n1,"a\n\nb",3\n\n1,2,3\n', 3, "an empty line"),
        ('who,what,when\n1,2,3\n1,"2,4\n1,3,5\n', 3, "a quote is not closed"),
        ("who,what,when\n1,2,3\n1,2\r,4\n", 3, "carriage return"),
        ('who,what,when\n1,"a""b\n",3\n1,5" disk",4\n', 3, "middle of a field"),
        ('who,what,when\n1,2,3\n1,"5"6,4\n', 3, "middle of a field"),
        ("who,what,who\n1,2,3\n", 1, "two columns are called 'who'"),
    ],
)
def test_the_row_of_a_fault_in_csv(tmp_path, text, row, match):
    file = write(tmp_path / "t.csv", text.replace("{long}", "x" * 200_000))
    fails(readers.read_table, file, file=file, row=row, match=match, **NAMES)


def test_a_message_is_one_line_of_a_readable_length(tmp_path):
    file = write(tmp_path / "t.csv", "who,what,when\n1,2," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"^.{1,1500}--time_format.{1,300}$"):
        readers.read_table(file, **NAMES)
    write(file, 'who,"w\nhat",when\n1,2,3\n')
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        readers.read_table(file, **NAMES)


def test_attributes_keep_their_zeros(tmp_path):
    file = write(
        tmp_path / "a.csv",
        "user_id,zip,n,x,long,odd\n1,02139,1,1.5,12345678901234567890123,1_0\n2,10001,-2,2,1,1\n",
    )
    frame = read_attributes(file, "user_id")
    assert frame.rows() == [
        (1, "02139", 1, 1.5, "12345678901234567890123", "1_0"), (2, "10001", -2, 2.0, "1", "1"),
    ]  # fmt: skip


def test_lists_of_numbers_hold_numbers(tmp_path):
    file = write(tmp_path / "a.user", "user_id:token\tv:float_seq\n1\t1 2\n2\t1 x\n")
    fails(
        read_attributes, file, "user_id", file=file, column="v", row=3, match="numbers, got '1 x'"
    )


def test_an_id_map_that_knows_nobody(tmp_path):
    file = write(tmp_path / "a.csv", "user_id,id\n3,20\n4,21\n")
    ids = write(tmp_path / "map.txt", "a 3\nb 8\n")
    assert read_attributes(file, "user_id", id_map=ids).rows() == [("a", 20)]
    write(ids, "a 8\n")
    fails(
        read_attributes, file, "user_id", ids, file=file, column="user_id", match="none of its ids"
    )
    write(ids, "a 003\n")
    fails(read_attributes, file, "user_id", ids, file=ids, column="original", row=1, match="'003'")


def test_json_lines_are_an_object_a_line(tmp_path):
    good = '{"who": "a", "what": "x", "when": 1}'
    for text, row, match in (
        (f"{good}\n\n{good}\n", 2, "is not JSON"),
        (f"{good}\n[1]\n", 2, "an object"),
        ("[" * 50_000, 1, "is not JSON"),
        (f"{good}\n" + good.replace("1}", "[1]}"), None, "cannot be read"),
    ):
        file = write(tmp_path / "t.jsonl", text)
        fails(readers.read_table, file, file=file, row=row, match=match, **NAMES)
    write(file, good + "\n" + good.replace("1}", "1706695200000000900.0}"))
    fails(readers.read_table, file, file=file, column="when", row=2, match="rounded", **NAMES)
