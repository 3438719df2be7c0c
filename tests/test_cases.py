# SPDX-License-Identifier: Apache-2.0
"""Inputs that once gave a wrong result or a traceback, kept beside the repository, and the right
result of each; and the same faults in small files made here."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from builders import model_of

from fastrec.cli import main
from fastrec.cli_serve import read_ids
from fastrec.data.dataset import SequenceDataset
from fastrec.data.output import write_table
from fastrec.data.prepare import prepare
from fastrec.data.prepare.readers import RawData
from fastrec.serve import recommend

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"


def case(number: str) -> Path:
    if not (CASES / number).is_dir():
        pytest.skip(f"no folder shared/cases/{number} beside the repository")
    return CASES / number


def prepared(tmp_path, source, output="data", **flags) -> SequenceDataset:
    flags = {"format": "table", **flags}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    main(["prepare", f"--source={source}", f"--output={tmp_path / output}", *flags])
    return SequenceDataset.load(tmp_path / output)


def refused(tmp_path, source, **flags) -> str:
    """The one line that `prepare` ends with; no data set is left."""
    with pytest.raises(SystemExit) as stopped:
        prepared(tmp_path, source, "refused", **flags)
    message = str(stopped.value)
    assert message.startswith("fastrec: error: ") and "\n" not in message
    assert not (tmp_path / "refused").exists()
    return message


def sequences(dataset) -> dict[str, list[str]]:
    items, ends = dataset.item_ids(), pairwise(dataset.offsets)
    return {
        user: items[dataset.values[begin:end]].tolist()
        for user, (begin, end) in zip(dataset.user_ids().tolist(), ends, strict=True)
    }


LOG = dict(user_column="card", item_column="article", timestamp_column="when")


def test_text_ids_stay_text_in_side_files(tmp_path):
    folder = case("01")
    dataset = prepared(
        tmp_path, folder / "log.csv", rating_column="stars", **LOG,
        user_attributes=folder / "people.csv", item_attributes=folder / "articles.csv",
    )  # fmt: skip
    people = dataset.user_attributes().select("user_id", "age", "city").rows()
    assert people == [("007", 31, "Oslo"), ("010", 62, "Bergen"), ("10", None, None)]
    articles = dataset.item_attributes().select("item_id", "colour").rows()
    assert articles == [("0108775015", "black"), ("0108775044", "white"), ("0110065001", "red")]


def test_ids_that_differ_by_zeros_are_different_users(tmp_path):
    folder = case("01")
    dataset = prepared(
        tmp_path, folder / "log.csv", **LOG, user_attributes=folder / "people_both.csv"
    )
    assert dataset.user_attributes()["age"].to_list() == [31, 62, 18]


def test_us_dates_need_a_format(tmp_path):
    folder = case("02")
    for name, written in (("us.csv", "%m/%d/%Y"), ("us_time.csv", "%m/%d/%Y %H:%M:%S")):
        assert "--time_format" in refused(tmp_path, folder / name, timestamp_column="when")
        dataset = prepared(
            tmp_path, folder / name, timestamp_column="when", time_format=written, overwrite="true"
        )
        assert sequences(dataset)["a"] == ["first", "second", "third"]


def test_nanoseconds_and_exponents_keep_their_order(tmp_path):
    folder = case("04")
    nano = prepared(tmp_path, folder / "nano.csv", timestamp_column="when")
    assert sequences(nano) == {"a": ["first", "second", "third"], "b": ["x", "y", "z"]}
    assert nano.schema["time"] == "nanoseconds since 1970"
    sci = prepared(tmp_path, folder / "sci.csv", timestamp_column="when", overwrite="true")
    assert sequences(sci) == {"a": ["x", "y", "z"]}


def test_side_files_without_a_header(tmp_path):
    folder = case("16")
    log = dict(source=folder / "log.csv", timestamp_column="timestamp")
    message = refused(tmp_path, **log, user_attributes=folder / "people.csv")
    assert "people.csv" in message and "--user_key" in message and "first line" in message
    dataset = prepared(tmp_path, **log, relations=folder / "trust.tsv")
    assert dataset.relations().tolist() == [[0, 1], [1, 2]]


# The same kinds in files made here


@pytest.fixture
def log(tmp_path):
    return write(tmp_path / "log.csv", "user_id,item_id,t\n007,a,1\n010,b,2\n10,a,3\n")


def write(path, text):
    path.write_text(text)
    return path


def test_integer_typed_ids_are_refused_beside_leading_zeros(tmp_path, log):
    people = tmp_path / "people.parquet"
    pl.DataFrame({"user_id": [7, 10], "age": [1, 2]}).write_parquet(people)
    message = refused(tmp_path, log, timestamp_column="t", user_attributes=people)
    assert "ids are integers, those of the interactions text such as '007'" in message
    log.write_text("user_id,item_id,t\n7,a,1\n10,b,2\n")
    assert prepared(
        tmp_path, log, timestamp_column="t", user_attributes=people
    ).user_attributes()["age"].to_list() == [1, 2]  # fmt: skip


def test_text_keys_are_no_integers(tmp_path, log):
    log.write_text("user_id,item_id,t\n7,a,1\n10,b,2\n")
    people = write(tmp_path / "people.csv", "user_id,age\n7,1\n010,2\n")
    message = refused(tmp_path, log, timestamp_column="t", user_attributes=people)
    assert f"{people}: column 'user_id', row 3: expected an integer id, got '010'" in message
    dataset = prepared(tmp_path, log, timestamp_column="t", user_attributes=people, ids="str")
    assert dataset.user_attributes()["age"].to_list() == [None, 1]


@pytest.mark.parametrize(
    ("flag", "text"),
    [("user_attributes", "user_id,age\nx7,1\n"), ("item_attributes", "item,p\nA,1\n"),
     ("relations", "from,to\nx7,x10\n")],
)  # fmt: skip
def test_a_side_file_about_nobody_is_an_error(tmp_path, log, flag, text):
    file = write(tmp_path / "side.csv", text)
    message = refused(tmp_path, log, timestamp_column="t", **{flag: file})
    assert str(file) in message and "occurs in the interactions" in message


def test_a_filter_may_leave_a_side_file_empty(tmp_path, log):
    people = write(tmp_path / "people.csv", "user_id,age\n10,1\n")
    dataset = prepared(tmp_path, log, timestamp_column="t", user_attributes=people, max_users=1)
    assert dataset.schema["filters"]["removed"] == {
        "interactions beyond 1 users": 2, "attribute rows of users without interactions": 1,
    }  # fmt: skip


def test_the_key_is_never_a_guess(tmp_path, log):
    people = write(tmp_path / "people.csv", "row,card,age\n010,007,1\n007,010,2\n")
    flags = dict(timestamp_column="t", user_attributes=people)
    assert "--user_key" in refused(tmp_path, log, **flags)
    assert "'who'" in refused(tmp_path, log, user_key="who", **flags)
    dataset = prepared(tmp_path, log, user_key="card", **flags)
    assert dataset.user_attributes()["age"].to_list() == [1, 2, None]
    write(people, "card,user_id,age\n010,007,1\n")
    log.write_text(log.read_text().replace("user_id", "card"))
    message = refused(tmp_path, log, user_column="card", **flags)
    assert "user_id and card may both hold the ids" in message
    message = refused(tmp_path, log, user_column="card", user_key="card", **flags)
    assert "column 'card': holds 'user_id' too" in message
    assert "user_key has no effect" in refused(
        tmp_path, log, user_column="card", timestamp_column="t", user_key="card"
    )


def test_names_like_regular_expressions_are_names(tmp_path):
    log = write(tmp_path / "log.csv", "^.*$,*,t\nu,a,1\nv,b,2\n")
    people = write(tmp_path / "people.csv", "age,^.*$\n1,v\n2,u\n")
    dataset = prepared(
        tmp_path, log, user_column="^.*$", item_column="*", timestamp_column="t",
        user_attributes=people,
    )  # fmt: skip
    assert dataset.user_attributes().rows() == [(0, "u", 2), (1, "v", 1)]


def test_names_of_files_are_no_patterns(tmp_path):
    for name, item in (("a1.parquet", "wrong"), ("a[1].parquet", "right"), ("a*.parquet", "star")):
        frame = pl.DataFrame({"user_id": ["u"], "item_id": [item], "t": [1]})
        frame.write_parquet(tmp_path / name)
    folder = tmp_path / "[1]"
    for name, item in (("a[1].parquet", "right"), ("a*.parquet", "star")):
        dataset = prepared(folder, tmp_path / name, timestamp_column="t", overwrite="true")
        assert dataset.item_ids().tolist() == [item]


@pytest.mark.parametrize("name", ["timestamp", "Time", "date"])
def test_the_order_of_the_file_is_not_taken_without_a_word(tmp_path, name):
    log = write(tmp_path / "log.csv", f"user_id,item_id,{name}\nu,b,2\nu,a,1\n")
    dataset = prepared(tmp_path, log)
    assert sequences(dataset) == {"u": ["a", "b"]}
    assert dataset.schema["inferred"]["timestamp_column"] == name
    message = refused(tmp_path, log, ordered="true")
    assert "time goes back" in message and "--timestamp_column none leaves" in message
    flags = {"ordered": "true", "timestamp_column": "none", "overwrite": "true"}
    assert sequences(prepared(tmp_path, log, **flags)) == {"u": ["b", "a"]}
    message = refused(tmp_path, log, timestamp_column="none")
    assert f"(there are user_id, item_id, {name})" in message and "--ordered true" in message


def test_words_for_missing_values_are_asked_about(tmp_path, log):
    people = write(tmp_path / "people.csv", "user_id,age,land\n007,NA,NA\n010,7,SE\n")
    flags = dict(timestamp_column="t", user_attributes=people)
    message = refused(tmp_path, log, **flags)
    assert "column 'age', row 2: 'NA'" in message and "--na_values missing" in message
    for how, ages, lands in (
        ("missing", [None, 7, None], [None, "SE", None]),
        ("text", ["NA", "7", None], ["NA", "SE", None]),
    ):
        table = prepared(tmp_path, log, na_values=how, overwrite="true", **flags).user_attributes()
        assert (table["age"].to_list(), table["land"].to_list()) == (ages, lands)
    log.write_text("user_id,item_id,t\nnan,a,1\n010,b,2\n")
    message = refused(tmp_path, log, timestamp_column="t")
    assert "column 'user_id', row 2: 'nan' looks like a missing id" in message
    dataset = prepared(tmp_path, log, "text", timestamp_column="t", na_values="text")
    assert dataset.user_ids().tolist() == ["010", "nan"]


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_an_index_column_is_no_attribute(tmp_path, log, name):
    people = write(tmp_path / "people.csv", f"{name},user_id,age\n0,007,1\n1,010,2\n")
    message = refused(tmp_path, log, timestamp_column="t", user_attributes=people)
    assert "column 1 of 3 has no name" in message


def test_text_links_and_a_header_that_may_be_one(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id,t\n007,a,1\nann,b,2\n")
    links = tmp_path / "links.tsv"
    flags = dict(timestamp_column="t", relations=links)
    write(links, "bob\tann\n007\tann\n")
    message = refused(tmp_path, log, **flags)
    assert "row 1" in message and "'ann' is a user" in message
    write(links, "0001\tbob\n007\tann\n")  # nobody of the log, and no header
    dataset = prepared(tmp_path, log, **flags)
    assert dataset.relations().tolist() == [[0, 1]]
    lost = {"relations with an end without interactions": 1}
    assert dataset.schema["filters"]["removed"] == lost
    write(links, "a\tb\n007\tann\n")
    assert prepared(tmp_path, log, "named", **flags).schema["filters"]["removed"] == {}


def test_the_only_line_may_be_a_link(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id,t\n1,a,1\n2,b,2\n")
    links = write(tmp_path / "links.tsv", "1\t2\n")
    flags = dict(timestamp_column="t", relations=links)
    assert prepared(tmp_path, log, **flags).relations().tolist() == [[0, 1]]
    write(links, "user\tfriend\n")
    assert "holds a header and no rows" in refused(tmp_path, log, **flags)


def test_quoted_nothing_is_missing(tmp_path, log):
    people = write(tmp_path / "people.csv", 'user_id,age,land\n007,"",""\n010,7,SE\n')
    dataset = prepared(tmp_path, log, timestamp_column="t", user_attributes=people)
    assert dataset.user_attributes().rows()[0] == (0, "007", None, None)
    assert dataset.user_attributes()["age"].dtype == pl.Int64


def test_flags_without_effect_are_errors(tmp_path, log):
    text = write(tmp_path / "s.txt", "1 2 3\n")
    for flag in ("ids=str", "time_format=%Y", "ordered=true", "separator=;"):
        name, value = flag.split("=")
        message = refused(tmp_path, text, format="s3rec", **{name: value})
        assert f"--{name}" in message and "no effect" in message
    message = refused(tmp_path, text, format="s3rec", na_values="missing")
    assert "--na_values has no effect" in message
    message = refused(tmp_path, log, ordered="true", time_format="%Y")
    assert "--time_format and --time_unit have no effect without --timestamp_column" in message


# Nothing left to recommend


@pytest.mark.parametrize("ids", ["text", "integers"])
def test_users_who_have_seen_everything_get_an_empty_table(tmp_path, ids):
    """Alone, and 512 of them: a whole block without a row."""
    known = [f"u{user:03}" if ids == "text" else user for user in range(600)]
    seen = [[0, 1, 2, 3]] * 512 + [[0, 1]] * 88
    events = [(user, item, 1) for user, items in zip(known, seen, strict=True) for item in items]
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    prepare(RawData("here", frame.with_columns(pl.col("item_id").cast(str))), tmp_path / "d")
    dataset, model = SequenceDataset.load(tmp_path / "d"), model_of(num_items=4)
    types = [pl.String if ids == "text" else pl.Int64, pl.Int64, pl.String, pl.Float32]
    alone = recommend(model, dataset, 3, user_ids=known[:1])
    assert alone.height == 0 and alone.dtypes == types
    everyone = recommend(model, dataset, 3)
    assert everyone.dtypes == types and set(everyone["item_id"]) == {"2", "3"}
    assert everyone["user_id"].to_list() == [user for user in known[512:] for _ in range(2)]
    assert recommend(model, dataset, 3, histories=[]).height == 0
    for name in ("best.csv", "best.parquet"):
        write_table(alone, tmp_path / name)
    assert pl.read_parquet(tmp_path / "best.parquet").dtypes == types


def test_recommend_for_the_bot(tmp_path):
    log = case("10") / "log.csv"
    dataset = prepared(
        tmp_path, log, user_column="who", item_column="what", timestamp_column="when"
    )
    best = recommend(model_of(num_items=dataset.num_items), dataset, 10, user_ids=["bot"])
    assert best.height == 0
    assert best.dtypes == [pl.String, pl.Int64, pl.String, pl.Float32]


def test_the_list_of_users_may_have_a_byte_order_mark(tmp_path):
    file = tmp_path / "users.txt"
    file.write_bytes(b"\xef\xbb\xbfu1\r\nu2\n")
    assert read_ids(file) == ["u1", "u2"]
    file.write_bytes(b"u1\nu\xe9\n")
    with pytest.raises(ValueError, match=r"users.txt: row 2: byte 0xe9 is not utf-8"):
        read_ids(file)
