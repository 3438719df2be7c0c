# SPDX-License-Identifier: Apache-2.0
"""`prepare` in blocks: of a few bytes, events and users each, it writes the same bytes and says the
same as in one block."""

import gzip
import random

import polars as pl
import pytest
from files import write

from fastrec.data import text_files
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import k_core, prepare, store


def small(monkeypatch, size):
    """Blocks of so many bytes, chunks and buckets of a few events."""
    monkeypatch.setattr(text_files, "BLOCK", 16 * size)
    monkeypatch.setattr(store, "CHUNK", size)
    monkeypatch.setattr(store, "BUCKET", size)


def both(tmp_path, monkeypatch, source, **options):
    """What one block and small ones give: the bytes of the files, or the error."""
    found = []
    for size in (None, 3, 20):
        with monkeypatch.context() as patch:
            if size is not None:
                small(patch, size)
            try:
                report = prepare(source, tmp_path / "data", overwrite=True, **options)
                said, took = str(report).rsplit("\n", 1)
                assert "events/s, peak memory" in took
                files = {file.name: file.read_bytes() for file in report.output.iterdir()}
            except (DataError, ValueError) as error:
                said, files = str(error), {}
            found.append((said, files))
    assert found[0] == found[1] == found[2]
    return found[0]


def log(count, seed=0, **columns):
    """Lines of `count` events; columns: name = what makes a field of (random, number)."""
    source = random.Random(seed)
    made = [",".join(str(field(source, row)) for field in columns.values()) for row in range(count)]
    return "\n".join([",".join(columns), *made]) + "\n"


USUAL = {
    "user_id": lambda r, _: r.randrange(12),
    "item_id": lambda r, _: r.randrange(9),
    "timestamp": lambda r, n: 1_700_000_000 + r.randrange(10**5) * 100 + n % 100,
}
RATED = USUAL | {
    "rating": lambda r, _: r.choice([1, 2, 3.5, 5]),
    "event": lambda r, _: r.choice(["buy", "click", "a, b".replace(", ", "-")]),
}


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (USUAL, {}),
        (USUAL, {"k_core": 5, "split": "last", "valid": 1, "test": 2}),
        (RATED, {"min_rating": 2.0, "max_users": 7, "k_core": 3}),
        (RATED, {"keep_events": ["buy"], "split": "ratio", "valid": 0.2, "test": 0.2}),
        (USUAL, {"split": "time", "valid": 1_704_000_000, "test": 1_707_000_000}),
        (USUAL | {"item_id": lambda r, n: f'"a\nb, ""{r.randrange(5)}"""'}, {}),
        # The last row makes all ids text, or all times finer, or of no unit.
        (USUAL | {"user_id": lambda r, n: r.randrange(9) if n < 99 else "x7"}, {}),
        (USUAL | {"item_id": lambda r, n: r.randrange(9) * 10**15}, {}),
        (USUAL | {"item_id": lambda r, n: r.randrange(9) * 10 ** (15 * (n > 60))}, {}),
        (USUAL | {"timestamp": lambda r, n: f"{1_700_000_000 + n}" + ".25" * (n == 99)}, {}),
        (USUAL | {"timestamp": lambda r, n: 1_700_000_000 + n if n < 99 else 17}, {}),
        (USUAL | {"timestamp": lambda r, n: f"2024-01-02T03:04:{n % 60:02}." + "0" * (n // 13)
                  + str(n + 1)[-1]}, {"on_duplicate": "drop"}),
        (USUAL | {"timestamp": lambda r, n: n // 4}, {"on_duplicate": "drop"}),
        (USUAL | {"timestamp": lambda r, n: n // 4}, {"on_duplicate": "keep"}),
        (USUAL | {"timestamp": lambda r, n: n}, {"ordered": True, "k_core": 2}),
        ({name: USUAL[name] for name in ("user_id", "item_id")}, {"ordered": True}),
        (RATED | {"rating": lambda r, n: "" if n % 7 == 6 else 3}, {"on_missing": "drop"}),
    ],
)  # fmt: skip
def test_blocks_of_any_size_give_the_same_bytes(tmp_path, monkeypatch, columns, options):
    said, files = both(
        tmp_path, monkeypatch, write(tmp_path / "t.csv", log(100, **columns)), **options
    )
    assert files, said
    assert SequenceDataset.load(tmp_path / "data").num_events > 10


@pytest.mark.parametrize(
    ("columns", "options", "match"),
    [
        (USUAL | {"timestamp": lambda r, n: n // 4}, {}, r"duplicate event: user .* in all"),
        (USUAL | {"user_id": lambda r, n: "" if n % 30 == 29 else n}, {}, "row 31: .* in 3 rows"),
        (USUAL | {"user_id": lambda r, n: "NA" if n == 80 else f"u{n}"}, {}, "row 82: 'NA' looks"),
        (USUAL | {"user_id": lambda r, n: "x" if n == 80 else n}, {"ids": "int"}, "row 82: .* 'x'"),
        (USUAL | {"timestamp": lambda r, n: 1_700_000_000 * (1000 if n == 70 else 1)}, {},
         "row 72: times are dates in s or in ms"),
        (USUAL | {"timestamp": lambda r, n: "2024-01-31" if n == 70 else 1_700_000_000 + n}, {},
         "row 72: expected a whole number"),
        (USUAL | {"timestamp": lambda r, n: f"2024-01-31T00:00:{n % 60:02}" + "Z" * (n == 70)}, {},
         "row 2: expected a time with an offset"),
        (USUAL | {"timestamp": lambda r, n: f"{n}" + ".5" * (n == 70)}, {}, "row 72: expected a"),
        (USUAL | {"timestamp": lambda r, n: 100 - n}, {"ordered": True}, "time goes back to"),
        (RATED, {"keep_events": ["sell"]}, "no event is of type 'sell'; there are a-b, buy, click"),
        (RATED | {"rating": lambda r, n: "x" if n == 50 else 1}, {}, "row 52: .* 'x'"),
        (USUAL, {"k_core": 60}, "no interaction is left in the 60-core"),
    ],
)  # fmt: skip
def test_blocks_of_any_size_are_refused_alike(tmp_path, monkeypatch, columns, options, match):
    source = write(tmp_path / "t.csv", log(100, **columns))
    said, files = both(tmp_path, monkeypatch, source, **options)
    assert not files
    with pytest.raises((DataError, ValueError), match=match):
        raise ValueError(said)


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        ("\n\n\n", None),
        ("\n\n1,2,3\n", "row 102: expected 3 fields, got an empty line"),
        ('\n"a,1,1\n', "row 102: a quote is not closed"),
        ('\n1,a"b",1\n', "row 102: a quote stands in the middle of a field"),
        ('\n"a\nb, ""c""",1,1', None),
        ("\n1,2\n", "row 102: expected 3 fields, got 2"),
        ("\n1,\udce9,2\n", "row 102: byte 0xe9 is not utf-8"),
        ("\n1,\0,2\n", "row 102: holds a NUL byte"),
        ("\n1,2\r3,4\n", "row 102: holds a carriage return that ends no line"),
        ("\r\n1,2,3\r\n", None),
    ],
)  # fmt: skip
def test_the_end_of_a_text(tmp_path, monkeypatch, tail, match):
    source = tmp_path / "t.csv"
    source.write_bytes((log(100, **USUAL)[:-1] + tail).encode(errors="surrogateescape"))
    said, files = both(tmp_path, monkeypatch, source)
    assert (not files) == (match is not None)
    assert match is None or match in said, said


def test_packed_encoded_and_separated_text(tmp_path, monkeypatch):
    content = log(100, **USUAL | {"item_id": lambda r, n: "é" * r.randrange(1, 5)})
    for name, data, options in (
        ("t.csv.gz", gzip.compress(content.encode()), {}),
        ("t.csv", content.encode("utf-16"), {"encoding": "utf-16"}),
        ("t.dat", content.replace(",", "::").encode(), {"separator": "::"}),
        ("t.txt", content.replace(",", " \t").encode() + b"  \n", {"separator": "whitespace"}),
    ):
        (tmp_path / name).write_bytes(data)
        assert both(tmp_path, monkeypatch, tmp_path / name, **options)[1], name
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(content.encode())[:-20])
    assert "truncated or corrupt gzip" in both(tmp_path, monkeypatch, cut)[0]


def test_parquet_frames_and_part_files(tmp_path, monkeypatch):
    frame = pl.read_csv(log(100, **RATED).encode())
    frame = frame.with_columns(pl.col("event").cast(pl.Categorical))
    expected = both(tmp_path, monkeypatch, frame)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, part in enumerate(frame.iter_slices(30)):
        part.write_parquet(folder / f"7f3a_{number:06}.parquet")  # as Ray calls them
    frame.write_parquet(tmp_path / "t.parquet")
    for source in (folder, tmp_path / "t.parquet"):
        found = both(tmp_path, monkeypatch, source)[1]
        for name in ("values.npy", "offsets.npy", "interactions.parquet", "users.parquet"):
            assert found[name] == expected[1][name], (source, name)


def test_files_of_parts_share_what_they_say(tmp_path, monkeypatch):
    columns = USUAL | {"timestamp": lambda r, n: n}
    files = [write(tmp_path / f"{n}.csv", log(100, seed=n, **columns)) for n in range(3)]
    options = {"split": "files", "valid_source": files[1], "test_source": files[2]}
    said, _ = both(tmp_path, monkeypatch, files[0], **options)
    assert "events stand in an earlier file too, the first is user" in said
    assert both(tmp_path, monkeypatch, files[0], on_duplicate="drop", **options)[1]
    assert both(tmp_path, monkeypatch, files[0], on_duplicate="keep", **options)[1]
    assert both(tmp_path, monkeypatch, files[0], ordered=True, on_duplicate="drop", **options)[1]


def test_the_core_of_few_events_left_is_that_of_passes(tmp_path, monkeypatch):
    """A chain of users and items, which passes take apart one by one, and a queue at once."""
    chain = [f"{n},{n + side},{n}" for n in range(60) for side in (0, 1)]
    core = [f"{n},{n + side},{n}" for n in (100, 101) for side in range(2) for _ in range(2)]
    lines = [
        "user,item,timestamp",
        *chain,
        *(f"{n % 2},{200 + n // 2},{n}" for n in range(20)),
        *core,
    ]
    source = write(tmp_path / "t.csv", "\n".join(lines) + "\n")
    expected = both(tmp_path, monkeypatch, source, k_core=2, on_duplicate="keep")
    monkeypatch.setattr(k_core, "_FEW", 0)
    assert both(tmp_path, monkeypatch, source, k_core=2, on_duplicate="keep") == expected
    assert expected[1]


def test_what_a_killed_process_left_goes_and_a_full_disk_is_named(tmp_path, monkeypatch):
    source = write(tmp_path / "t.csv", log(100, **USUAL))
    (tmp_path / ".scratch.data" / "read").mkdir(parents=True)
    prepare(source, tmp_path / "data")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "t.csv"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(OSError, match=r"scratch.data/read cannot be written: .* No space left"):
        prepare(source, tmp_path / "data", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "t.csv"]
