# SPDX-License-Identifier: Apache-2.0
"""Readers: what they read, and that bad input is reported with file, column and row."""

import gzip

import pytest
from files import fails, rows, write

from fastrec.data.errors import DataError
from fastrec.data.prepare import readers

# S3-Rec text


def test_s3rec(tmp_path):
    file = write(tmp_path / "a.txt", "1 5 3 5\n2 3 3\n")
    attributes = write(tmp_path / "a.json", '{"3": [2, 1, 2], "5": []}')
    raw = readers.read(str(file), "s3rec", item_attributes=attributes)
    assert rows(raw) == [(1, 5), (1, 3), (1, 5), (2, 3), (2, 3)]
    assert raw.ordered and not raw.removed
    assert raw.items.rows() == [(3, [2, 1]), (5, [])]


def test_s3rec_gzip_windows_ends_and_no_final_newline(tmp_path):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"1 5 3\r\n2 4"))
    assert rows(readers.read_s3rec(file)) == [(1, 5), (1, 3), (2, 4)]


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ("1 2 3\n2\n3 4\n", None, 2, "user item item"),
        ("1 2 3\n\n3 4\n", None, 2, "user item item"),
        ("1 2 3\n2 x 4\n", "item", 2, "'x'"),
        ("1 2 3\nu 3 4\n", "user", 2, "'u'"),
        ("1 2 3\n2 3 -4\n", "item", 2, "'-4'"),
        ("1 2 3\n2 3 4.5\n", "item", 2, "'4.5'"),
        ("1 2 3\n2 3 99999999999999999999\n", "item", 2, "integer"),
        ("1 2 3\n2 3 4\n1 5 6\n", "user", 3, "listed twice"),
        ("1 2 3\n2 3\x00 4\n", None, 2, "NUL"),
        ("", None, None, "empty"),
        (" \n\n", None, None, "empty"),
        ("1 2 3\n2 007 4\n", "item", 2, "'007'"),
        ("1 2 3\n+2 3 4\n", "user", 2, r"'\+2'"),
        ("1 2 3\n2 3 -0\n", "item", 2, "'-0'"),
        ("1 2 3\n2 \uff17 3\n", "item", 2, "'\uff17'"),
        ("1 2 3\r2 4 5\r", None, 1, "neither a blank nor a line end"),
        ("1 2 3\n2\u00a03 4\n", None, 2, "neither a blank nor a line end"),
    ],
)
def test_s3rec_bad_input(tmp_path, text, column, row, match):
    file = write(tmp_path / "bad.txt", text)
    fails(readers.read_s3rec, file, file=file, column=column, row=row, match=match)


def test_unreadable_files(tmp_path):
    missing = tmp_path / "none.txt"
    fails(readers.read_s3rec, missing, file=missing, match="missing")
    fails(readers.read_s3rec, tmp_path, file=tmp_path, match="not a file")
    latin = write(tmp_path / "latin.txt", "1 2\n2 é\n", "latin-1")
    fails(readers.read_s3rec, latin, file=latin, row=2, match="0xe9 is not utf-8")
    packed = gzip.compress(b"1 2 3\n" * 1000)
    short = tmp_path / "short.txt.gz"
    short.write_bytes(packed[:-10])
    fails(readers.read_s3rec, short, file=short, match="gzip")
    short.write_bytes(b"1 2 3\n")
    fails(readers.read_s3rec, short, file=short, match="gzip")
    short.write_bytes(packed[:20] + b"\xff\xff\xff" + packed[23:])
    fails(readers.read_s3rec, short, file=short, match="gzip")


# One pair a line


def test_pairs(tmp_path):
    file = write(tmp_path / "p.txt", "1 5\n2 7\n1 3\n1 5\n")
    raw = readers.read_pairs(file)
    assert rows(raw) == [(1, 5), (2, 7), (1, 3), (1, 5)] and raw.ordered


@pytest.mark.parametrize(
    ("text", "column", "row"),
    [
        ("1 5\n2\n", None, 2),
        ("1 5\n2 3 4\n", None, 2),
        ("1 5\n\n2 4\n", None, 2),
        ("1 5\n2 x\n", "item", 2),
        ("1 5\n2 4\n+2 4\n", "user", 3),
    ],
)
def test_pairs_bad_input(tmp_path, text, column, row):
    file = write(tmp_path / "bad.txt", text)
    fails(readers.read_pairs, file, file=file, column=column, row=row)


# MovieLens


def test_movielens_1m(tmp_path):
    write(tmp_path / "ratings.dat", "1::10::5::100\n2::11::3::50\n1::11::4::90\n")
    write(tmp_path / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072-1\n")
    write(tmp_path / "movies.dat", "10::Café (1995)::Drama|War\n11::B::Drama\n", "latin-1")
    raw = readers.read(tmp_path, "movielens-1m")
    assert rows(raw) == [(1, 10, 100, 5.0), (2, 11, 50, 3.0), (1, 11, 90, 4.0)]
    assert not raw.ordered
    assert raw.users.rows()[1] == (2, "M", 56, 16, "70072-1")
    assert raw.items.rows() == [(10, "Café (1995)", ["Drama", "War"]), (11, "B", ["Drama"])]


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ("1::10::5::100\n2::11::3\n", None, 2, "expected 4 fields, got 3"),
        ("1::10::5::100\n2::11::x::5\n", "rating", 2, "'x'"),
        ("1::10::5::100\n2::11::nan::5\n", "rating", 2, "nan"),
        ("1::10::5::100\n2::11::3::\n", "timestamp", 2, "missing"),
        ("1::10::5::100\n2::11::3::5.5\n", "timestamp", 2, "whole"),
        ("1::10::5::100\n2::b::3::5\n", "item", 2, "'b'"),
        ("1::10::5::100\n2::11::3::5\n1::10::4::100\n", None, 3, "user 1, item 10.*row 1"),
    ],
)
def test_movielens_1m_bad_input(tmp_path, text, column, row, match):
    file = write(tmp_path / "ratings.dat", text)
    fails(readers.read_movielens_1m, file, file=file, column=column, row=row, match=match)


def test_movielens_100k(tmp_path):
    write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    write(tmp_path / "u.user", "196|24|M|technician|85711\n186|53|F|other|94043\n")
    flags = "|".join("1" if number in (3, 5) else "0" for number in range(19))
    lines = [f"{i}|Amélie|01-Jan-1995||http://x|{flags}" for i in (242, 302)]
    write(tmp_path / "u.item", "\n".join(lines) + "\n", "latin-1")
    raw = readers.read(tmp_path, "movielens-100k")
    assert rows(raw) == [(196, 242, 881250949, 3.0), (186, 302, 891717742, 3.0)]
    assert raw.users.rows()[0] == (196, 24, "M", "technician", "85711")
    assert raw.items.rows()[0] == (242, "Amélie", "01-Jan-1995", [3, 5])


def test_movielens_100k_half_a_line(tmp_path):
    file = write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\n")
    fails(readers.read_movielens_100k, file, file=file, row=2, match="expected 4 fields, got 2")
    fails(readers.read_movielens_100k, tmp_path / "no", file=tmp_path / "no", match="missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(readers.read_movielens_100k, empty, file=empty, match="found 0")


# RecBole


def recbole(tmp_path, inter):
    return write(tmp_path / "d.inter", inter)


HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def test_recbole(tmp_path):
    recbole(tmp_path, HEAD + "u1\t10\t3\t100\nu2\t11\t4.5\t90\n")
    write(tmp_path / "d.user", "user_id:token\tage:token\tv:float_seq\nu2\t24\t1 2.5\nu1\t\t\n")
    write(tmp_path / "d.item", "item_id:token\ttitle:token_seq\tp:float\n10\tToy Story\t1.5\n")
    write(tmp_path / "d.net", "source_id:token\ttarget_id:token\nu1\tu2\n")
    raw = readers.read(tmp_path, "recbole")
    assert rows(raw) == [("u1", 10, 100, 3.0), ("u2", 11, 90, 4.5)]
    assert raw.users.rows() == [("u2", "24", [1.0, 2.5]), ("u1", None, None)]
    assert raw.items.rows() == [(10, ["Toy", "Story"], 1.5)]
    assert raw.relations.rows() == [("u1", "u2")]


@pytest.mark.parametrize(
    ("text", "column", "row", "match"),
    [
        ("user_id:token\titem_id\n1\t2\n", "item_id", 1, "name:type"),
        ("user_id:token\titem_id:text\n1\t2\n", "item_id:text", 1, "name:type"),
        (HEAD + "1\t2\tx\t5\n", "rating", 2, "'x'"),
        (HEAD + "1\t2\t\t5\n", "rating", 2, "missing"),
        (HEAD + "1\t2\t3\t5\n1\t2\t3\n", None, 3, "expected 4 fields, got 3"),
        (HEAD + "1\t2\t3\t5\n\t2\t3\t5\n", "user_id", 3, "missing"),
        (HEAD + "1\t2\t3\t5\n1\t2\t3\t5\t6\n", None, 3, "expected 4 fields"),
        (HEAD + "1\t2\t3\t5\n1\t2\t3\tnan\n", "timestamp", 3, "whole"),
        (HEAD, None, None, "no rows"),
        (
            "user_id:token\trating:float\ttimestamp:float\n1\t2\t3\n",
            "item_id",
            None,
            "missing; there are user_id, rating, timestamp$",
        ),
        ("user_id:token\titem_id:token\n1\t2\n", None, None, "--ordered true"),
    ],
)
def test_recbole_bad_input(tmp_path, text, column, row, match):
    file = recbole(tmp_path, text)
    fails(readers.read_recbole, file, file=file, column=column, row=row, match=match)


def test_recbole_settings(tmp_path):
    file = recbole(tmp_path, HEAD + "1\t10\t3\t1700000000.5\n\t11\t4\t1700000000\n")
    raw = readers.read(file, "recbole", on_missing="drop", time_unit="s")
    assert rows(raw) == [(1, 10, 1700000000500, 3.0)] and raw.time == "milliseconds since 1970"
    assert raw.removed == {"interactions without user_id": 1} and raw.inferred == {}


def test_duplicates(tmp_path):
    file = recbole(tmp_path, HEAD + "1\t2\t3\t5\n1\t2\t4\t6\n3\t2\t3\t5\n1\t2\t5\t5\n")
    fails(readers.read_recbole, file, file=file, row=5, match="first in row 2")
    kept = readers.read_recbole(file, on_duplicate="keep")
    assert kept.interactions.height == 4 and not kept.removed
    dropped = readers.read_recbole(file, on_duplicate="drop")
    assert rows(dropped) == [(1, 2, 5, 3.0), (1, 2, 6, 4.0), (3, 2, 5, 3.0)]
    assert dropped.removed == {"duplicate events": 1}
    with pytest.raises(ValueError, match="on_duplicate must be"):
        readers.read_recbole(file, on_duplicate="first")


def test_files_beside_a_source_may_be_gzipped(tmp_path):
    def pack(name, text):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))

    pack("d.inter.gz", HEAD + "1\t10\t3\t100\n2\t10\t3\t100\n")
    pack("d.user.gz", "user_id:token\tage:float\n2\t24\n")
    pack("d.net.gz", "source_id:token\ttarget_id:token\n1\t2\n")
    raw = readers.read(tmp_path, "recbole")
    assert raw.users.rows() == [(2, 24.0)] and raw.relations.rows() == [(1, 2)]
    pack("ratings.dat.gz", "1::10::5::100\n")
    pack("users.dat.gz", "1::F::1::10::48067\n")
    assert readers.read(tmp_path, "movielens-1m").users.rows() == [(1, "F", 1, 10, 48067)]


def test_a_bad_file_can_be_reported_across_processes():
    import pickle

    error = pickle.loads(pickle.dumps(DataError("f.csv", "is bad", column="c", row=3)))
    assert str(error) == "f.csv: column 'c', row 3: is bad" and error.row == 3
