# SPDX-License-Identifier: Apache-2.0
"""What tables are read from: delimited text of any kind, JSON, part files, data frames."""

import csv
import gzip
import io
import json

import polars as pl
import pytest
from files import fails, rows, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare, readers
from fastrec.data.prepare.sources import read_source

FIELD = st.text(
    st.characters(codec="latin-1", exclude_characters='\r\n\0"\x1f\x85\xa0'), max_size=6
)


def plain_rows(text: str, separator: str) -> list[list[str]]:
    """The rows of a text, by the csv module or by a split of each line."""
    if separator in (",", ";"):
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    return [line.split(separator) for line in text.split("\n")[:-1]]


@settings(deadline=None, max_examples=120)
@given(
    table=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t", "::", "|", "\u00a7", " "]),
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-16"]),
    header=st.booleans(),
    packed=st.booleans(),
)
def test_delimited_text_is_read_as_it_was_written(
    tmp_path_factory, table, separator, encoding, header, packed
):
    table = [
        [field.replace(separator, "").replace(":", "") for field in row]
        for row in table
        if any(row)
    ]
    names = ["a", "b", "c"]
    text = "".join(separator.join(row) + "\n" for row in ([names] if header else []) + table)
    if not text.strip() or not table or any(not "".join(row).strip() for row in table):
        return
    file = tmp_path_factory.mktemp("d") / ("t.dat.gz" if packed else "t.dat")
    data = text.encode(encoding)
    file.write_bytes(gzip.compress(data) if packed else data)
    frame, where = read_source(
        file, separator=separator, columns=None if header else names, encoding=encoding
    )
    expected = plain_rows(text, separator)[header:]
    assert [[field or "" for field in row] for row in frame.rows()] == expected
    assert frame.columns == names
    assert where.place(len(expected) - 1) == (file, len(expected) + header)


def test_whitespace_is_any_run_of_blanks_and_tabs(tmp_path):
    file = write(
        tmp_path / "t.txt", "  1\t 2010-10-19T23:55:27Z  22 3\n2 2010-10-18T22:17:43Z\t7 5 \n\n"
    )
    raw = readers.read_table(
        file, separator="whitespace", columns=["user", "time", "item", "stars"]
    )
    assert [(row[0], row[1], row[3]) for row in rows(raw)] == [(1, 22, 3.0), (2, 7, 5.0)]
    write(file, "1 2 3\n1 2\n")
    options = {"separator": "whitespace", "columns": ["user", "item", "time"]}
    fails(readers.read_table, file, file=file, row=2, match="expected 3 fields, got 2", **options)
    write(file, "1 2 3\n1\u00a02 3\n")
    fails(readers.read_table, file, file=file, row=2, match="neither a blank", **options)
    write(file, "1 2 3\n1 \x1f2 3\n")
    fails(readers.read_table, file, file=file, row=2, match="0x1f", **options)


@pytest.mark.parametrize("separator", ["#", "~", "|", "'", "\u00a7"])
def test_any_separator_can_be_said_on_the_command_line(tmp_path, separator):
    text = "user,item,time\n1,2,3\n".replace(",", separator)
    file = write(tmp_path / "t.csv", text)
    main(["prepare", f"--source={file}", f"--output={tmp_path / 'd'}", "--separator", separator])
    assert SequenceDataset.load(tmp_path / "d").num_events == 1


def test_a_file_without_a_header_needs_names(tmp_path):
    file = write(tmp_path / "t.csv", "A1,0143026860,1.0,1424304000\nA2,0143026860,4.0,1418860800\n")
    fails(
        readers.read_table, file, file=file,
        match="if this first line is a row, --columns names its 4 columns",
    )  # fmt: skip
    fails(readers.read_table, file, file=file, column="who", match="--columns", user="who")
    raw = readers.read_table(file, columns=["user", "item", "rating", "time"])
    assert rows(raw)[0] == ("A1", "0143026860", 1424304000, 1.0)
    fails(
        readers.read_table, file, file=file, row=1, match="expected 3 fields, got 4",
        columns=["user", "item", "time"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="--columns holds a name twice"):
        readers.read_table(file, columns=["user", "item", "x", "x"])


def test_settings_of_text_have_no_effect_elsewhere(tmp_path):
    pl.DataFrame({"user": [1], "item": [2], "time": [3]}).write_parquet(tmp_path / "t.parquet")
    lines = write(tmp_path / "t.jsonl", '{"user": 1, "item": 2, "time": 3}\n')
    for name, value in (("separator", ","), ("columns", ["a"]), ("encoding", "latin-1")):
        with pytest.raises(ValueError, match=f"--{name} has no effect on a .parquet file"):
            readers.read_table(tmp_path / "t.parquet", **{name: value})
        with pytest.raises(ValueError, match=f"{name} has no effect on a data frame"):
            readers.read_table(pl.DataFrame({"user": [1]}), **{name: value})
        if name != "encoding":
            with pytest.raises(ValueError, match=f"--{name} has no effect on a .jsonl file"):
                readers.read_table(lines, **{name: value})


def test_encodings(tmp_path):
    file = write(tmp_path / "t.csv", "user,item,time\ncafé,1,2\n", "latin-1")
    fails(readers.read_table, file, file=file, row=2, match="0xe9 is not utf-8 .*--encoding")
    assert rows(readers.read_table(file, encoding="latin-1"))[0][0] == "café"
    fails(readers.read_table, file, file=file, match="is not ascii", encoding="ascii")
    for name in ("utf-16-le", "utf-8", "latin-1"):
        mark = "\u00ef\u00bb\u00bf" if name == "latin-1" else "\ufeff"
        write(file, f"{mark}user,item,time\n1,2,3\n", name)
        assert rows(readers.read_table(file, encoding=name)) == [(1, 2, 3)]
    for name in ("klingon", "hex"):
        with pytest.raises(ValueError, match=f"--encoding '{name}' is not known"):
            readers.read_table(file, encoding=name)


def test_the_message_of_an_unknown_suffix_shows_the_first_line(tmp_path):
    file = write(tmp_path / "t.dat", "1::122::5::838985046\n")
    with pytest.raises(ValueError, match=r"suffix '.dat' .* begins with '1::122::5::838985046'"):
        readers.read_table(file)


def test_files_that_have_to_be_unpacked_first(tmp_path):
    for name, match in (("ml.zip", "unpack"), ("a.tar.gz", "unpack"), ("a.xlsx", "as .csv")):
        file = write(tmp_path / name, "x")
        fails(readers.read_table, file, file=file, match=match)


EVENTS = [{"user": "u", "item": 10 + i, "time": 5 - i, "x": {"deep": [i]}} for i in range(3)]


def test_json_may_be_an_array_lines_or_python_dictionaries(tmp_path):
    expected = [("u", 10, 5), ("u", 11, 4), ("u", 12, 3)]
    for text in (
        json.dumps(EVENTS, indent=1),
        "\n".join(map(json.dumps, EVENTS)),
        "\n".join(map(str, EVENTS)),
        "\n".join(str(event).replace("{'user'", "{u'user'") for event in EVENTS),
    ):
        assert rows(readers.read_table(write(tmp_path / "t.json", text))) == expected
        (tmp_path / "t.json.gz").write_bytes(gzip.compress(text.encode()))
        assert rows(readers.read_table(tmp_path / "t.json.gz")) == expected


@pytest.mark.parametrize(
    ("text", "row", "match"),
    [
        ("[\n1]", 1, "array of objects"),
        ("[]", None, "no rows"),
        ('[{"user": 1},\n{"user" 2}]', 2, "not JSON"),
        ("{'user': 1}\n{'user': open('x')}", 2, "neither JSON nor a Python dictionary"),
        ("{'user': 1}\n{'user'", 2, "neither JSON nor"),
        ("{'user'}\n", 1, "an object"),
        ("{'user': " + "[" * 5000 + "]" * 5000 + "}", 1, "neither JSON nor"),
    ],
)
def test_bad_json(tmp_path, text, row, match):
    file = write(tmp_path / "t.json", text)
    fails(readers.read_table, file, file=file, row=row, match=match)


def spark(folder, parts: dict[str, str]):
    folder.mkdir()
    for name, text in parts.items():
        (folder / name).write_text(text)
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.csv.crc").write_bytes(b"crc")
    return folder


HEAD = "user,item,time\n"


def test_part_files_are_read_in_the_order_of_their_names(tmp_path):
    parts = {
        "part-00001-x.csv": HEAD + "2,11,5\n", "part-00000-x.csv": HEAD + "1,10,7\n1,12,6\n",
        "part-00002-x.csv": HEAD, "part-00003-x.csv": "",
    }  # fmt: skip
    folder = spark(tmp_path / "log", parts)
    raw = readers.read_table(folder)
    assert rows(raw) == [(1, 10, 7), (1, 12, 6), (2, 11, 5)] and raw.source == str(folder)
    second = write(folder / "part-00001-x.csv", HEAD + "2,11,5\n2,x,soon\n")
    fails(readers.read_table, folder, file=second, column="time", row=3, match="'soon'")
    write(second, HEAD + "2,11,5\n1,10,7\n")
    fails(
        readers.read_table, folder, file=second, row=3,
        match="first in row 2 of .*part-00000-x.csv; 1 in all",
    )  # fmt: skip
    write(second, "user,time,item\n2,11,5\n")
    fails(readers.read_table, folder, file=second, match="columns are user, time, item, those of")
    names = ["user", "item", "time"]
    plain = spark(tmp_path / "plain", {"part-00001": "2 11 5\n", "part-00000": "1 10 7\n"})
    read = readers.read_table(plain, separator="whitespace", columns=names)
    assert rows(read) == [(1, 10, 7), (2, 11, 5)]


def test_part_files_of_parquet_and_json(tmp_path):
    folder = spark(tmp_path / "a", {"part-1.json": json.dumps(EVENTS[1])})
    (folder / "part-0.json").write_text(json.dumps(EVENTS[0]) + "\n")
    assert rows(readers.read_table(folder)) == [("u", 10, 5), ("u", 11, 4)]
    folder = spark(tmp_path / "b", {})
    frame = pl.DataFrame(EVENTS)
    frame[:1].write_parquet(folder / "part-00000-c.snappy.parquet")
    frame[1:].write_parquet(folder / "part-00001-c.snappy.parquet")
    assert rows(readers.read_table(folder)) == [("u", 10, 5), ("u", 11, 4), ("u", 12, 3)]


def test_folders_that_are_not_read(tmp_path):
    empty = spark(tmp_path / "a", {})
    fails(readers.read_table, empty, file=empty, match="found none")
    fails(readers.read_table, spark(tmp_path / "b", {"part-0.csv": ""}), file=tmp_path / "b",
          match="no part file holds a row")  # fmt: skip
    mixed = spark(tmp_path / "c", {"part-0.csv": HEAD + "1,2,3\n", "notes.txt": "x"})
    fails(readers.read_table, mixed, file=mixed, match="found notes.txt")
    (empty / "_temporary").mkdir()
    fails(readers.read_table, empty, file=empty, match="has not finished")


def test_data_frames(tmp_path):
    frame = pl.DataFrame({"user": ["b", "a"], "item": [1, -2], "time": [7, 6]})
    expected = [("b", 1, 7), ("a", -2, 6)]
    for source in (frame, frame.lazy(), frame.to_arrow()):
        raw = readers.read_table(source)
        assert rows(raw) == expected and raw.source == "data frame"
    fails(readers.read_table, frame.clear(), file="data frame", match="no rows")
    bad = frame.with_columns(time=pl.Series([1, None]))
    fails(readers.read_table, bad, file="data frame", column="time", row=2, match="missing")
    floats = frame.with_columns(user=pl.Series([1.0, 2.0]))
    fails(readers.read_table, floats, file="data frame", column="user", match="astype")
    with pytest.raises(ValueError, match="s3rec is a kind of file, not of a data frame"):
        readers.read(frame, "s3rec")
    with pytest.raises(ValueError, match="keep_events must be a list of names, got 'buy'"):
        readers.read(frame, "table", keep_events="buy")
    binary = frame.with_columns(user=pl.Series([b"b", b"\xff"]))
    fails(readers.read_table, binary, file="data frame", column="user", match="bytes that are no")
    kinds = frame.with_columns(kind=pl.Series([1, 2]))
    raw = readers.read(kinds, "table", keep_events=[1], event_type="kind")
    assert raw.interactions.height == 1, "types may be numbers"


def test_side_tables_may_be_frames_of_any_kind(tmp_path):
    log = pl.DataFrame({"user": ["b", "a"], "item": [1, 2], "time": [7, 6]})
    people = pl.DataFrame({"user_id": ["a", "b"], "age": [30, 40]})
    links = pl.DataFrame({"from": ["a"], "to": ["b"]}).lazy()
    prepare(log, tmp_path / "d", user_attributes=people.to_arrow(), relations=links)
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_attributes()["age"].to_list() == [30, 40]
    assert dataset.relations().tolist() == [[0, 1]]


def test_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    times = pandas.to_datetime(["2020-01-01", "2020-01-02"])
    frame = pandas.DataFrame(
        {"user_id": ["b", "a"], "item_id": [1, 2], "time": times}, index=[7, 3]
    )
    raw = readers.read_table(frame)
    assert [row[:2] for row in rows(raw)] == [("b", 1), ("a", 2)]
    assert raw.time == "microseconds since 1970" and raw.inferred["user_column"] == "user_id"
    fails(
        readers.read_table, frame.assign(item_id=["x", None]), file="data frame",
        column="item_id", row=2, match="missing",
    )  # fmt: skip
    mixed = frame.assign(user_id=[1, "x"])
    fails(readers.read_table, mixed, file="data frame", column="user_id", match="be read")
