# SPDX-License-Identifier: Apache-2.0
"""Rows of users and items of another catalogue: files, ids, splits, what is refused."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
import torch
from builders import lists_of, synthetic
from files import fails, write

from fastrec.data.cold_items import ColdItems, ColdRows
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import prepare
from fastrec.data.prepare.side_tables import read_cold_items

EVENTS = "user,item,time\n7,b,1\n7,a,2\n7,c,3\n9,a,1\n9,b,2\n9,c,3\n12,a,1\n12,c,2\n12,b,4\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def rows(data) -> ColdRows:
    return ColdRows(SequenceDataset.load(data))


def prepared(tmp_path, text: str, **settings):
    source = write(tmp_path / "events.csv", EVENTS)
    return prepare(
        source, tmp_path / "data", cold_items=write(tmp_path / "cold.csv", text), **settings
    )


def test_rows_keep_their_original_ids(tmp_path):
    text = "user,item\n9,z9\n7,z1\n9,z10\n5,z1\n9,z9\n12,z1\n7,z0\n"
    report = prepared(tmp_path, text)
    assert report.removed == {
        "cold-start rows of users without interactions": 1,
        "cold-start rows that are there twice": 1,
    }
    assert "cold start: 5 rows of 3 users and 4 items of another catalogue" in str(report)
    dataset = SequenceDataset.load(tmp_path / "data")
    table = dataset.cold_items()
    users = dataset.user_ids()[table["user"].to_numpy()].tolist()
    assert list(zip(users, table["item_id"], strict=True)) == [
        (7, "z1"), (7, "z0"), (9, "z9"), (9, "z10"), (12, "z1"),
    ]  # fmt: skip
    found = ColdRows(dataset)
    assert found.ids.tolist() == ["z0", "z1", "z10", "z9"], "in the order of the ids"
    assert found.items.tolist() == [1, 0, 3, 2, 1] and found.num_cold_items == 4
    assert found.num_items == 3 and found.num_users == 5
    batch = found.gather([3, 1, 2], "all")
    items = [[dataset.item_ids()[item] for item in row] for row in lists_of(batch)]
    assert items == [["a", "b", "c"], ["b", "a", "c"], ["a", "b", "c"]], "the users' whole history"
    assert batch.keys.tolist() == [3, 1, 2], "a row has a key of its own"


def test_ids_of_both_catalogues_have_nothing_to_do_with_each_other(tmp_path):
    """Items may be numbers there and text here; a table without a header is read as links are."""
    prepared(tmp_path, "7,30\n9,4\n9,30\n")
    dataset = SequenceDataset.load(tmp_path / "data")
    assert ColdRows(dataset).ids.tolist() == [4, 30]
    frame = pl.DataFrame({"who": [7, 12], "what": ["q", "r"]})
    prepare(tmp_path / "events.csv", tmp_path / "other", cold_items=frame)
    assert ColdRows(SequenceDataset.load(tmp_path / "other")).ids.tolist() == ["q", "r"]


def test_wrong_files_are_named(tmp_path):
    foreign = "column 'user_id': none of its 2 ids occurs in the interactions: 1 here, 7 there"
    with pytest.raises(DataError, match=foreign):
        prepared(tmp_path, "user,item\n1,a\n2,b\n")
    file = write(tmp_path / "one.csv", "user\n7\n8\n")
    fails(read_cold_items, file, file=file, match="expected two columns of ids, got")
    file = write(tmp_path / "gap.csv", "user,item\n7,a\n8,\n")
    fails(read_cold_items, file, file=file, column="item", row=3)
    with pytest.raises(DataError, match="expected two columns of ids, got"):
        prepare(tmp_path / "events.csv", tmp_path / "d", cold_items=pl.DataFrame({"user": [7]}))


def test_a_data_set_without_rows_says_what_is_missing(tmp_path):
    write(tmp_path / "events.csv", EVENTS)
    prepare(tmp_path / "events.csv", tmp_path / "data")
    dataset = SequenceDataset.load(tmp_path / "data")
    assert dataset.cold_items() is None
    with pytest.raises(DataError, match=r"cold_items.parquet: file is missing: .* --cold_items"):
        ColdRows(dataset)


def test_a_damaged_file_is_refused(tmp_path):
    prepared(tmp_path, "7,30\n9,4\n")
    file = tmp_path / "data" / "cold_items.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DataError, match=r"cold_items.parquet: is not the file that was written"):
        SequenceDataset.load(tmp_path / "data")


def test_rows_are_split_at_random(rows):
    parts = rows.split(ColdItems())
    count = len(rows.owners)
    assert len(parts["test"]) == round(0.15 * count) and len(parts["valid"]) == round(0.05 * count)
    together = torch.cat(list(parts.values()))
    assert torch.equal(together.sort().values, torch.arange(count)), "every row once"
    owners = {name: set(rows.owners[part].tolist()) for name, part in parts.items()}
    assert owners["train"] & owners["test"], "a user may be in several"
    again, other = rows.split(ColdItems()), rows.split(ColdItems(seed=1))
    assert all(torch.equal(again[name], parts[name]) for name in parts)
    assert not torch.equal(other["test"], parts["test"])


@pytest.mark.parametrize("by", ["row", "user"])
@pytest.mark.parametrize("rest", [0.4, 0.6])
def test_shares_are_rounded_to_the_nearest(rows, by, rest):
    count = len(rows.owners if by == "row" else rows.owners.unique())
    nearest = round(rest)
    left = count - 20 - 30 - 2 * nearest
    shares = {"valid": (20 + rest) / count, "test": (30 + rest) / count}
    parts = rows.split(ColdItems(by=by, fraction=(40 + rest) / left, **shares))
    sizes = {
        n: len(part if by == "row" else rows.owners[part].unique()) for n, part in parts.items()
    }
    assert sizes == {"train": 40 + nearest, "valid": 20 + nearest, "test": 30 + nearest}


def test_users_are_split_with_all_their_rows(rows):
    parts = rows.split(ColdItems(by="user", valid=0.1, test=0.2))
    owners = [set(rows.owners[part].tolist()) for part in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    people = len(rows.owners.unique())
    assert [len(o) for o in owners[1:]] == [round(0.1 * people), round(0.2 * people)]
    assert sum(map(len, parts.values())) == len(rows.owners)


@pytest.mark.parametrize("by", ["row", "user"])
def test_fractions_are_nested_and_leave_the_test_alone(rows, by):
    found = [rows.split(ColdItems(by=by, fraction=f)) for f in (0.4, 0.6, 0.8, 1.0)]
    for less, more in pairwise(found):
        assert set(less["train"].tolist()) < set(more["train"].tolist())
        assert torch.equal(less["test"], more["test"])
        assert torch.equal(less["valid"], more["valid"])
    share = len(found[0]["train"]) / len(found[-1]["train"])
    assert abs(share - 0.4) < 0.03


def test_wrong_splits_are_refused(rows):
    for settings, message in [
        ({"valid": 0.0}, r"cold_items\.valid must be in \(0, 1\), got 0"),
        ({"valid": 0.5, "test": 0.5}, "no row would train"),
        ({"fraction": 0.0}, r"cold_items\.fraction must be in \(0, 1\], got 0"),
        ({"by": "item"}, "by must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            ColdItems(**settings)
    with pytest.raises(ValueError, match="cold_items leaves no row for valid: there are .* rows"):
        rows.split(ColdItems(valid=1e-6))
