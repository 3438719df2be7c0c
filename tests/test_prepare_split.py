# SPDX-License-Identifier: Apache-2.0
"""`prepare --split`: every kind on a small file against the rule by hand, from the command line to
ranks; settings that leave nothing; damaged files."""

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from files import write
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import prepare
from fastrec.data.prepare.raw import RawData
from fastrec.data.prepare.split import divided, split_of

RAW = RawData("here", pl.DataFrame())
# Days of January 2024 on which a user does something; the item is the day and the user.
DAYS = {
    "ann": [1, 2, 3, 8, 9, 10, 20, 21, 22, 23],
    "bob": [2, 9, 21, 22],
    "cat": [9, 10],
    "dan": [25],
}


def kept(user, item, **columns):
    """Events in memory as `filters.Kept` gives them, in two chunks."""
    columns |= {"user": user, "item": item}
    cut = len(user) // 2

    def chunks(*names):
        for some in (slice(cut), slice(cut, None)):
            yield {name: columns[name][some] for name in ("user", "item", *names)}

    return SimpleNamespace(lengths=np.bincount(user), item=np.arange(item.max() + 1), chunks=chunks)


def log(folder, days=DAYS, name="log.csv"):
    rows = [
        f"{user},{'x' if day > 9 else 'y'}{day},2024-01-{day:02}"
        for user, list_ in days.items()
        for day in list_
    ]
    return write(folder / name, "user,item,time\n" + "\n".join(rows) + "\n")


def made(folder, source, *flags):
    main(["prepare", f"--source={source}", f"--output={folder / 'data'}", *flags])
    return SequenceDataset.load(folder / "data")


def parts_of(dataset):
    """By user: the items of training, validation and test."""
    items, found = dataset.item_ids(), {}
    for user, name in enumerate(dataset.user_ids()):
        start, end = dataset.offsets[user], dataset.offsets[user + 1]
        own = items[dataset.values[start:end]].tolist()
        train, valid = dataset.splits[user].tolist()
        found[name] = own[:train], own[train:valid], own[valid:]
    return found


def test_last(tmp_path, capsys):
    dataset = made(tmp_path, log(tmp_path), "--split=last", "--valid=1", "--test=2")
    found = parts_of(dataset)
    assert found["ann"][1:] == (["x21"], ["x22", "x23"])
    assert found["bob"] == (["y2"], ["y9"], ["x21", "x22"])
    assert found["cat"][1:] == found["dan"][1:] == ([], [])
    said = dataset.schema["split"]
    assert (said["kind"], said["valid"], said["test"]) == ("last", 1, 2)
    assert said["rule"].startswith("the last 2 events of a user are test, the 1 before them valid")
    assert said["parts"]["test"] == {
        "events": 4, "users": 2, "targets": 4, "targets_without_training": 4,
        "users_without_input": 0,
    }  # fmt: skip
    assert dataset.num_short_users == dataset.schema["num_short_users"] == 2
    assert "  test  4 targets of 2 users, 4 of items without a training" in capsys.readouterr().out


def test_ratio(tmp_path):
    dataset = made(tmp_path, log(tmp_path), "--split=ratio", "--valid=0.3", "--test=0.5")
    lengths = {name: tuple(map(len, parts)) for name, parts in parts_of(dataset).items()}
    assert lengths == {"ann": (2, 3, 5), "bob": (1, 1, 2), "cat": (1, 0, 1), "dan": (1, 0, 0)}
    assert dataset.users("valid").tolist() == [0, 1] and dataset.users("test").tolist() == [0, 1, 2]


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    hundredths=st.tuples(st.integers(1, 98), st.integers(1, 98)).filter(lambda p: sum(p) < 100),
)
@example(lengths=[100], hundredths=(29, 29))  # 0.29 * 100 is 28.999999999999996
@example(lengths=[100], hundredths=(57, 29))
def test_ratio_is_rounded_down_exactly(lengths, hundredths):
    user = np.repeat(np.arange(len(lengths)), lengths)
    split = split_of("ratio", *(part / 100 for part in hundredths))
    valid, test = ([n * part // 100 for n in lengths] for part in hundredths)
    rest = [n - v - t for n, v, t in zip(lengths, valid, test, strict=True)]
    try:
        ends, said = divided(split, RAW, kept(user, np.zeros_like(user)))
    except DataError as error:
        assert "no user has" in str(error) and (sum(valid) == 0 or sum(test) == 0)
        return
    assert ends[:, 0].tolist() == rest and min(rest) >= 1
    assert (ends[:, 1] - ends[:, 0]).tolist() == valid
    assert said["parts"]["train"]["events"] == sum(rest)


CUTS = ["--valid=2024-01-08", "--test=2024-01-20"]


def test_time(tmp_path, capsys):
    dataset = made(tmp_path, log(tmp_path), "--split=time", *CUTS)
    assert parts_of(dataset) == {
        "ann": (["y1", "y2", "y3"], ["y8", "y9", "x10"], ["x20", "x21", "x22", "x23"]),
        "bob": (["y2"], ["y9"], ["x21", "x22"]),
        "cat": ([], ["y9", "x10"], []),  # no input: not evaluated, counted
        "dan": ([], [], ["x25"]),
    }
    assert dataset.users("train").tolist() == dataset.users("valid").tolist() == [0, 1]
    assert dataset.users("test").tolist() == [0, 1]
    assert dataset.num_items == 11, "items of the test stay in the catalogue"
    parts = dataset.schema["split"]["parts"]
    assert parts["valid"] == {
        "events": 6, "users": 2, "targets": 4, "targets_without_training": 4,
        "users_without_input": 1,
    }  # fmt: skip
    assert parts["test"]["users_without_input"] == 1 and parts["test"]["targets"] == 6
    said = capsys.readouterr().out
    assert "events before 2024-01-08 are training, those from then on validation, those" in said
    assert "of items without a training event; not evaluated: 1 users without an event befo" in said


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 1000)])
@pytest.mark.parametrize("text", ["2024-01-08T00:00:00.5", "2024-01-08T01:00:00.5+01:00", "number"])
def test_cuts_in_the_unit_of_the_source(tmp_path, unit, scale, text):
    """An event at the cut is behind it, also where the cut lies between two moments of the unit."""
    base = 1704672000 * scale  # 2024-01-08
    moments = [base - 1, base, base + scale // 2, base + scale, base + 2 * scale]
    first = [each for each in moments if each * 2 < 2 * base + scale]
    if text == "number":
        text = str(moments[len(first)])
    rows = [f"u,{i},{moment}" for i, moment in enumerate(sorted(set(moments)))]
    first = sorted(set(first))
    file = write(tmp_path / "log.csv", "user,item,time\n" + "\n".join(rows) + "\n")
    report = prepare(
        file, tmp_path / "data", split="time", valid=text, test=base + 2 * scale, time_unit=unit
    )
    dataset = SequenceDataset.load(report.output)
    assert dataset.splits.tolist() == [[len(first), len(rows) - 1]]


@settings(deadline=None, max_examples=60)
@given(
    users=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6),
    cuts=st.tuples(st.integers(-1, 11), st.integers(-1, 11)).filter(lambda c: c[0] < c[1]),
)
def test_an_event_belongs_to_the_part_its_time_lies_in(users, cuts):
    users = [sorted(times) for times in users]
    user = np.repeat(np.arange(len(users)), [len(times) for times in users])
    times = pl.Series([time for each in users for time in each], dtype=pl.Int64)
    raw = RawData("here", pl.DataFrame({"timestamp": times}))
    item = times.to_numpy()
    expected = [[sum(time < cut for time in each) for cut in cuts] for each in users]
    try:
        ends, said = divided(split_of("time", *cuts), raw, kept(user, item, timestamp=item))
    except DataError:
        assert all(
            train == 0 or train == valid for train, valid in expected
        ) or all(
            valid in (0, len(each)) for each, (_, valid) in zip(users, expected, strict=True)
        )  # fmt: skip
        return
    assert ends.tolist() == expected
    asked = [
        (time, train) for each, (train, valid) in zip(users, expected, strict=True)
        for time in each[train:valid] if train
    ]  # fmt: skip
    known = {time for each in users for time in each if time < cuts[0]}
    assert said["parts"]["valid"]["targets"] == len(asked)
    assert said["parts"]["valid"]["targets_without_training"] == len(
        [time for time, _ in asked if time not in known]
    )


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            ["--valid=2024-01-20", "--test=2024-01-08"],
            "--valid 2024-01-20 is not before --test 2024",
        ),
        (["--valid=2024-01-08", "--test=2024-01-08"], "is not before"),
        (
            ["--valid=January", "--test=2024-01-08"],
            "--valid is 'January': expected a whole number, or",
        ),
        (
            ["--valid=1.5", "--test=2024-01-08"],
            "--valid is '1.5': expected a whole number, or an ISO",
        ),
        (
            ["--valid=2023-01-01", "--test=2024-01-08"],
            "no event is left to train on: events before",
        ),
        (
            ["--valid=2024-01-08", "--test=2025-01-01"],
            "no user has a test target and an event before",
        ),
        (
            ["--valid=2024-01-08"],
            "--split time needs --valid and --test, the times that they begin",
        ),
    ],
)
def test_cuts_that_leave_nothing_are_errors(tmp_path, flags, error):
    with pytest.raises(SystemExit) as stopped:
        made(tmp_path, log(tmp_path), "--split=time", *flags)
    assert error in str(stopped.value) and not (tmp_path / "data").exists()


def test_a_time_split_needs_times_of_a_known_unit(tmp_path):
    file = write(tmp_path / "pairs.txt", "1 1\n1 2\n1 3\n")
    with pytest.raises(DataError, match="--split time needs times"):
        prepare(file, tmp_path / "d", format="pairs", split="time", valid="1", test="2")
    file = write(tmp_path / "log.csv", "user,item,time\n1,1,1\n1,2,2\n1,3,3\n")
    with pytest.raises(DataError, match="are numbers of unknown unit, and --valid is '2024-01-08'"):
        prepare(file, tmp_path / "d", split="time", valid="2024-01-08", test="2024-01-09")
    report = prepare(file, tmp_path / "d", split="time", valid=2, test=3)
    assert SequenceDataset.load(report.output).splits.tolist() == [[1, 2]]
    events = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [5, 4]}
    raw = RawData("rows", pl.DataFrame(events), ordered=True)
    with pytest.raises(DataError, match="times of a user fall: --split time needs them in order"):
        prepare(raw, tmp_path / "e", split="time", valid=1, test=5)


PARTS = [
    {"ann": [3, 1, 2], "bob": [4], "eve": [7]},
    {"ann": [8, 9], "cat": [9], "eve": [5]},
    {"ann": [22, 21], "bob": [20], "cat": [23]},
]


def three(folder, parts=PARTS):
    names = ("train.csv", "valid.csv", "test.csv")
    train, valid, test = (log(folder, *each) for each in zip(parts, names, strict=True))
    return train, [f"--valid_source={valid}", f"--test_source={test}"]


def test_files(tmp_path):
    source, flags = three(tmp_path)
    dataset = made(tmp_path, source, "--split=files", *flags)
    assert parts_of(dataset) == {
        "ann": (["y1", "y2", "y3"], ["y8", "y9"], ["x21", "x22"]),
        "bob": (["y4"], [], ["x20"]),
        "cat": ([], ["y9"], ["x23"]),
        "eve": (["y7"], ["y5"], []),  # the files are in order, whatever their times say
    }
    said = dataset.schema["split"]
    assert said["valid"] == str(tmp_path / "valid.csv") and said["kind"] == "files"
    assert said["rule"].endswith(f"{tmp_path / 'valid.csv'} and {tmp_path / 'test.csv'}")
    assert said["parts"]["valid"]["users_without_input"] == 1
    assert dataset.schema["tie_rule"].endswith(", training before validation before test")
    assert dataset.users("test").tolist() == [0, 1, 2]


def test_files_of_other_forms(tmp_path):
    lines = ["1 5 6\n2 6\n", "1 7\n2 7\n", "1 8 9\n3 9\n"]
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(lines)]
    report = prepare(
        files[0], tmp_path / "d", format="s3rec", split="files", valid_source=files[1],
        test_source=files[2],
    )  # fmt: skip
    dataset = SequenceDataset.load(report.output)
    assert parts_of(dataset) == {1: ([5, 6], [7], [8, 9]), 2: ([6], [7], []), 3: ([], [], [9])}
    frames = [
        pl.DataFrame({"user": users, "item": items, "time": times})
        for users, items, times in (
            ([1, 1, 2], [5, 6, 6], [20, 10, 1]), ([1, 2], [7, 7], [5, 6]), ([1], [8], [0]),
        )
    ]  # fmt: skip
    how = dict(split="files", valid_source=frames[1], test_source=frames[2])
    report = prepare(frames[0], tmp_path / "e", **how)
    assert parts_of(SequenceDataset.load(report.output))[1] == ([6, 5], [7], [8])
    assert report.split["rule"].count("data frame") == 3
    report = prepare(frames[0], tmp_path / "f", max_users=1, **how)
    assert parts_of(SequenceDataset.load(report.output)) == {1: ([6, 5], [7], [8])}


@pytest.mark.parametrize(
    ("change", "flags", "error"),
    [
        ("user,item,time,rating\nann,y8,2024-01-08,3\n", [], "has no rating, "),
        ("user,item,time\nann,8,2024-01-08\n", [], "item_id is Int64, that of "),
        ("user,item,time\nann,y8,1704672000\n", [], "times are seconds since 1970, those of "),
        (
            "user,item,time\nann,y1,2024-01-01\n",
            [],
            "1 events stand in an earlier file too, the fir",
        ),
        ("user,item,time\n", [], "valid.csv: "),
        ("user,item,time\nzoe,y8,2024-01-08\n", [], "no user has a validation target and an event"),
        (None, ["--valid=1"], "--valid has no effect on --split files"),
        (
            None,
            ["--split=last", "--valid=1", "--test=1"],
            "--valid_source has no effect on --split l",
        ),
    ],
)
def test_files_that_do_not_fit_are_errors(tmp_path, change, flags, error):
    source, files = three(tmp_path)
    if change is not None:
        write(tmp_path / "valid.csv", change)
    with pytest.raises(SystemExit) as stopped:
        made(tmp_path, source, "--split=files", *files, *flags)
    assert error in str(stopped.value) and not (tmp_path / "data").exists()
    with pytest.raises(
        SystemExit, match="needs --valid_source and --test_source, files like --sou"
    ):
        made(tmp_path, source, "--split=files", files[0])


@pytest.mark.parametrize(("how", "events"), [("keep", 10), ("drop", 9)])
def test_an_event_of_two_files(tmp_path, how, events):
    source, files = three(tmp_path, [PARTS[0], {**PARTS[1], "ann": [3, 8]}, PARTS[2]])
    dataset = made(tmp_path, source, "--split=files", *files, f"--on_duplicate={how}")
    assert dataset.num_events == events + 3
    ann = parts_of(dataset)["ann"]
    assert ann[1] == (["y3", "y8"] if how == "keep" else ["y8"])
    removed = dataset.schema["filters"]["removed"]
    assert removed == ({} if how == "keep" else {"events that stand in an earlier file": 1})


def test_values_of_a_configuration_file(tmp_path):
    source = log(tmp_path)
    values = {"last": (1, 2), "ratio": (0.3, 0.5), "time": ("2024-01-08", "2024-01-20")}
    for kind, (valid, test) in values.items():
        text = f"source: {source}\noutput: {tmp_path / kind}\nsplit: {kind}\n"
        config = write(tmp_path / "prepare.yaml", text + f"valid: {valid}\ntest: {test}\n")
        main(["prepare", f"--config={config}"])
        again = tmp_path / "again"
        report = prepare(source, again, split=kind, valid=valid, test=test, overwrite=True)
        assert SequenceDataset.load(tmp_path / kind).schema["split"] == report.split


def test_leave_one_out_writes_what_it_wrote(tmp_path):
    dataset = made(tmp_path, log(tmp_path))
    assert dataset.splits is None and "split" not in dataset.schema
    assert not (tmp_path / "data" / "splits.npy").exists()
    assert dataset.users("test").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "--split last needs --valid and --test, how many events of a user: no valid"),
        (["--valid=2"], "no test"),
        (
            ["--valid=0", "--test=1"],
            "--valid of --split last must be a whole number above 0, got '0'",
        ),
        (["--valid=1", "--test=0.5"], "--test of --split last must be a whole number above 0"),
        (
            ["--valid=5", "--test=5"],
            "no user has a validation target and an event before it: the l",
        ),
        (["--split=ratio", "--valid=0.5", "--test=0.5"], "leave nothing to train on"),
        (["--split=ratio", "--valid=0.5", "--test=nan"], "must be between 0 and 1, got 'nan'"),
        (["--split=ratio", "--valid=2", "--test=0.1"], "must be between 0 and 1, got '2'"),
        (["--split=ratio", "--valid=0.01", "--test=0.5"], "no user has a validation target"),
        (["--split=leave_one_out", "--test=1"], "--test has no effect on --split leave_one_out"),
    ],
)
def test_settings_that_leave_nothing_are_errors(tmp_path, flags, error):
    with pytest.raises(SystemExit) as stopped:
        made(tmp_path, log(tmp_path), "--split=last", *flags)
    assert error in str(stopped.value)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="--split must be one of"):
        prepare(tmp_path / "log.csv", tmp_path / "data", split="random")


@pytest.mark.parametrize(
    ("splits", "match"),
    [
        ([[8, 9]] * 3, r"shape must be \[4, 2\], the file has \[3, 2\]"),
        ([[7, 11], [1, 2], [2, 2], [1, 1]], "user 0 has 10 events, and boundaries 7 and 11"),
        ([[7, 8], [2, 1], [2, 2], [1, 1]], "user 1 has 4 events, and boundaries 2 and 1"),
        ([[-1, 8], [1, 2], [2, 2], [1, 1]], "user 0 has 10 events, and boundaries -1 and 8"),
        ([[7.0, 8.0]] * 4, "dtype must be int64, got float64"),
        ([[7, 9], [1, 2], [2, 2], [1, 1]], "is not the file that was written with schema.json"),
    ],
)
def test_damaged_splits(tmp_path, splits, match):
    made(tmp_path, log(tmp_path), "--split=last", "--valid=1", "--test=2")
    np.save(tmp_path / "data" / "splits.npy", np.array(splits))
    with pytest.raises(DataError, match=match) as caught:
        SequenceDataset.load(tmp_path / "data")
    assert caught.value.file == str(tmp_path / "data" / "splits.npy")


def test_splits_and_schema_belong_together(tmp_path):
    made(tmp_path, log(tmp_path), "--split=last", "--valid=1", "--test=2")
    folder = tmp_path / "data"
    schema = json.loads((folder / "schema.json").read_text())
    (folder / "splits.npy").rename(folder / "other")
    with pytest.raises(DataError, match=r"splits\.npy: file is missing"):
        SequenceDataset.load(folder)
    (folder / "other").rename(folder / "splits.npy")
    (folder / "schema.json").write_text(json.dumps(schema | {"split": "last"}))
    with pytest.raises(DataError, match="'split' must say how users are split, got 'last'"):
        SequenceDataset.load(folder)
    del schema["digests"]["splits.npy"], schema["split"]
    (folder / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(DataError, match=r"splits\.npy: is not the file that was written"):
        SequenceDataset.load(folder)


def test_from_a_file_to_ranks_of_every_target(tmp_path, capsys):
    generator = np.random.default_rng(0)
    days = {
        f"u{user}": sorted(generator.choice(np.arange(1, 31), 12, replace=False).tolist())
        for user in range(40)
    }
    dataset = made(tmp_path, log(tmp_path, days), "--split=last", "--valid=2", "--test=3")
    run, ranks = tmp_path / "run", tmp_path / "ranks.csv"
    main(
        ["pretrain", "--config=sasrec", "--model.width=8", "--pretraining.steps=4",
         "--pretraining.validate_every=2", "--pretraining.batch_size=16",
         f"--data={tmp_path / 'data'}", f"--output={run}"]
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert {"HR@10", "Recall@10", "MAP@10"} <= set(summary["valid"]) and summary["users"] == 40
    main(
        ["evaluate", f"--data={tmp_path / 'data'}", f"--pretrained={run / 'model'}",
         f"--ranks={ranks}", f"--output={tmp_path / 'metrics.json'}"]
    )  # fmt: skip
    assert (
        "40 users with 120 targets, those of a user in one ranking, split test"
        in capsys.readouterr().out
    )
    rows = pl.read_csv(ranks)
    expected = [
        (user, item) for user, parts in parts_of(dataset).items() for item in parts[2]
    ]  # fmt: skip
    assert rows.select("user_id", "item_id").rows() == expected
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["users"] == 40 and found["targets"] == 120
    hits = rows.group_by("user_id").agg((pl.col("rank") <= 5).mean())["rank"].mean()
    assert found["metrics"]["model"]["Recall@5"] == pytest.approx(hits)
