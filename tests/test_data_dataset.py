# SPDX-License-Identifier: Apache-2.0
"""The dataset: leave-one-out by hand, gather against a slow reference, damaged files."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from builders import dataset_of, lists_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.dataset import SequenceDataset
from fastrec.data.dataset_files import digest
from fastrec.data.errors import DataError
from fastrec.data.prepare.writer import write_dataset

SEQUENCES = [[3, 1, 4, 1, 5], [2, 0], [5, 4, 3], [], [1], [0, 1, 2, 3]]
V = 6
INPUTS = {
    "all": SEQUENCES,
    "train": [[3, 1, 4], [2, 0], [5], [], [1], [0, 1]],
    "valid": [[3, 1, 4], None, [5], None, None, [0, 1]],
    "test": [[3, 1, 4, 1], None, [5, 4], None, None, [0, 1, 2]],
}


def write(path, sequences, num_items):
    user = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    item = [item for sequence in sequences for item in sequence]
    events = {"user": user, "item": item, "timestamp": np.arange(len(user))}
    write_dataset(
        path,
        interactions=pl.DataFrame(events, schema=dict.fromkeys(events, pl.Int64)),
        users=pl.DataFrame({"user_id": [f"u{i}" for i in range(len(sequences))]}),
        items=pl.DataFrame({"item_id": [10 * i for i in range(num_items)]}),
        relations=pl.DataFrame({"user": [0, 2], "friend": [1, 0]}) if len(sequences) > 2 else None,
        tie_rule="none",
        time="row",
        source="test",
    )
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "d", SEQUENCES, V)


@pytest.fixture
def dataset(folder):
    return SequenceDataset.load(folder)


def test_counts_and_ids(dataset):
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == (6, 6, 15)
    assert dataset.lengths.tolist() == [5, 2, 3, 0, 1, 4] and dataset.num_short_users == 3
    assert dataset.user_ids().tolist() == ["u0", "u1", "u2", "u3", "u4", "u5"]
    assert dataset.item_ids().tolist() == [0, 10, 20, 30, 40, 50]
    assert isinstance(dataset.values, np.memmap) and dataset.values.dtype == np.int32
    assert not dataset.values.flags.writeable


@pytest.mark.parametrize("name", INPUTS)
def test_leave_one_out(dataset, name):
    users = [u for u, sequence in enumerate(INPUTS[name]) if sequence]
    assert dataset.users(name).tolist() == users
    assert dataset.split_lengths(name).tolist() == [len(s or ()) for s in INPUTS[name]]
    batch = dataset.gather(users, name)
    assert lists_of(batch) == [INPUTS[name][u] for u in users]
    assert batch.keys.tolist() == users
    flat = [item for sequence in INPUTS[name] for item in sequence or ()]
    assert dataset.item_counts(name).tolist() == [flat.count(item) for item in range(V)]


def test_targets(dataset):
    assert dataset.targets("valid").tolist() == [1, -1, 4, -1, -1, 2]
    assert dataset.targets("test").tolist() == [5, -1, 3, -1, -1, 3]
    with pytest.raises(ValueError, match="targets, got 'train'"):
        dataset.targets("train")


def test_gather_by_hand(dataset):
    batch = dataset.gather([5, 0], "test", 3)
    assert lists_of(batch) == [[0, 1, 2], [1, 4, 1]]
    assert batch.keys.tolist() == [5, 0] and batch.max_seq_len == 3
    assert batch.values.dtype == batch.offsets.dtype == batch.keys.dtype == torch.int64
    assert batch.events == batch.users == {} and batch.pairs is batch.scored is batch.real is None
    assert lists_of(dataset.gather([0, 0], "train", 2)) == [[1, 4], [1, 4]]
    assert lists_of(dataset.gather([3, 5], "train", 0)) == [[], []]
    empty = dataset.gather([], "test", 3)
    assert (len(empty), empty.max_seq_len, empty.offsets.tolist()) == (0, 0, [0])


@settings(deadline=None, max_examples=150)
@given(
    sequences=st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=8).filter(any),
    name=st.sampled_from(["all", "train", "valid", "test"]),
    max_len=st.none() | st.integers(0, 6),
    data=st.data(),
)
def test_gather_against_one_user_at_a_time(sequences, name, max_len, data):
    dataset = dataset_of(sequences, 10)
    able = [u for u, s in enumerate(sequences) if len(s) >= 3 or name in ("all", "train")]
    users = data.draw(st.lists(st.sampled_from(able), max_size=10)) if able else []
    hidden = {"all": 0, "train": 2, "valid": 2, "test": 1}[name]
    expected = []
    for user in users:
        items = sequences[user]
        if len(items) >= 3 and hidden:
            items = items[:-hidden]
        if max_len is not None:
            items = items[max(0, len(items) - max_len) :]
        expected.append(items)
    batch = dataset.gather(torch.tensor(users, dtype=torch.int64), name, max_len)
    assert lists_of(batch) == expected and batch.keys.tolist() == users
    assert batch.max_seq_len == max(map(len, expected), default=0)


def test_gather_rejects(dataset):
    with pytest.raises(IndexError, match=r"user 6 is out of \[0, 6\)"):
        dataset.gather([0, 6], "train")
    with pytest.raises(IndexError, match="user -1"):
        dataset.gather([-1], "train")
    with pytest.raises(ValueError, match="user 1 has fewer than 3 events"):
        dataset.gather([0, 1], "test")
    with pytest.raises(ValueError, match="split must be one of"):
        dataset.gather([0], "tests")
    with pytest.raises(ValueError, match="max_len must not be negative, got -1"):
        dataset.gather([0], "train", -1)
    with pytest.raises(ValueError, match="one dimension"):
        dataset.gather([[0]], "train")


# Damaged files


def fails(folder, name, match):
    with pytest.raises(DataError, match=match) as caught:
        SequenceDataset.load(folder)
    assert caught.value.file == str(folder / name)


@pytest.mark.parametrize("name", ["schema.json", "values.npy", "offsets.npy"])
def test_missing_and_truncated_files(folder, name):
    data = (folder / name).read_bytes()
    for size in (len(data) - 4, 40, 0):
        (folder / name).write_bytes(data[:size])
        fails(folder, name, "is not JSON" if name == "schema.json" else "truncated")
    (folder / name).unlink()
    fails(folder, name, "missing")


def test_schema_is_checked(folder):
    good = json.loads((folder / "schema.json").read_text())
    for change, match in (
        ({"version": 2}, "format version 2 is unknown"),
        ({"format": "other"}, "not a fastrec dataset"),
        ({"num_users": "6"}, "'num_users' must be a positive integer, got '6'"),
        ({"num_items": 0}, "'num_items'"),
    ):
        (folder / "schema.json").write_text(json.dumps(good | change))
        fails(folder, "schema.json", match)


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("offsets.npy", [0, 5, 7, 10, 10, 11], "6 elements|says 7"),
        ("offsets.npy", [0, 5, 7, 6, 10, 11, 15], "not monotone: they fall after index 2"),
        ("offsets.npy", [1, 5, 7, 10, 10, 11, 15], "runs from 1"),
        ("offsets.npy", [0, 5, 7, 10, 10, 11, 16], "to 16"),
        ("offsets.npy", [0.0] * 7, "dtype must be int64, got float64"),
        ("values.npy", np.zeros(14, np.int32), "says 15"),
        ("values.npy", np.array([0] * 9 + [6] + [0] * 5, np.int32), "item 6 at index 9"),
        ("values.npy", np.array([0] * 14 + [-1], np.int32), "item -1 at index 14"),
        ("values.npy", np.zeros(15, np.float32), "dtype must be int32 or int64"),
        ("values.npy", np.array([None] * 15, dtype=object), "truncated or not"),
    ],
)
def test_damaged_arrays(folder, name, array, match):
    np.save(folder / name, np.asarray(array))
    fails(folder, name, match)


def test_validate_false_skips_the_contents_only(folder):
    np.save(folder / "values.npy", np.full(15, 77, np.int32))
    assert SequenceDataset.load(folder, validate=False).num_events == 15
    np.save(folder / "values.npy", np.full(14, 1, np.int32))
    with pytest.raises(DataError):
        SequenceDataset.load(folder, validate=False)


def test_damaged_tables(folder):
    dataset = SequenceDataset.load(folder)
    users = folder / "users.parquet"
    data = users.read_bytes()
    users.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"users.parquet: is not the file that was written"):
        dataset.user_ids()
    users.unlink()
    with pytest.raises(DataError, match=r"users.parquet: file is missing"):
        dataset.user_attributes()


def test_tables_of_another_kind(folder):
    """As if they had been written with schema.json."""
    dataset, users = SequenceDataset.load(folder), folder / "users.parquet"

    def written(file):
        dataset.schema["digests"][file.name] = digest(file)

    users.write_bytes(users.read_bytes()[:-9])
    written(users)
    with pytest.raises(DataError, match=r"users.parquet: cannot be read as Parquet"):
        dataset.user_ids()
    shutil.copy(folder / "items.parquet", users)
    written(users)
    with pytest.raises(DataError, match="column 'user_id': column is missing"):
        dataset.user_ids()
    pl.DataFrame({"user": [0], "user_id": ["u0"]}).write_parquet(users)
    written(users)
    with pytest.raises(DataError, match="says 6 rows, the file has 1"):
        dataset.user_ids()
    pl.DataFrame({"user": [0], "friend": [6]}).write_parquet(folder / "relations.parquet")
    written(folder / "relations.parquet")
    with pytest.raises(DataError, match=r"relations.parquet: user out of \[0, 6\)"):
        dataset.relations()


def test_ids_of_another_day_do_not_name_the_users_of_this_one(folder, tmp_path):
    """Loaded, then replaced by a data set of as many users: the arrays are those of before."""
    dataset = SequenceDataset.load(folder)
    frame = pl.read_parquet(folder / "users.parquet")
    frame.with_columns(pl.col("user_id").reverse()).write_parquet(tmp_path / "new")
    (tmp_path / "new").replace(folder / "users.parquet")
    with pytest.raises(DataError, match=r"users.parquet: is not the file that was written"):
        dataset.user_ids()


def test_without_relations(tmp_path):
    dataset = SequenceDataset.load(write(tmp_path / "d", [[1, 2, 0]], 3))
    assert dataset.relations() is None


def test_write_dataset_rejects(tmp_path):
    with pytest.raises(DataError, match="at least one interaction"):
        write(tmp_path / "d", [[]], 3)
    with pytest.raises(ValueError, match=r"item out of \[0, 3\)"):
        write(tmp_path / "d", [[3]], 3)
    events = pl.DataFrame({"user": [1, 0], "item": [0, 0], "timestamp": [0, 0]})
    ids = pl.DataFrame({"user_id": [0, 1], "item_id": [0, 1]})
    with pytest.raises(ValueError, match="sorted by user"):
        write_dataset(
            tmp_path / "d", interactions=events, users=ids, items=ids, tie_rule="", time="",
            source="",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
