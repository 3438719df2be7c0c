# SPDX-License-Identifier: Apache-2.0
"""Side data: read when it is first asked for, errors that name the file, hidden attributes."""

import re
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from builders import dataset_of, lists_of

from fastrec.data.attributes import Attribute
from fastrec.data.dataset import SequenceDataset
from fastrec.data.dataset_files import digest
from fastrec.data.errors import DataError
from fastrec.data.prepare.writer import write_dataset
from fastrec.data.side import SideData

SEQUENCES = [[3, 1, 4, 1, 5], [2, 0, 1], [5, 4, 3], [0, 1, 2, 3, 5, 4], [1, 1, 1]]
AGES = [10.0, 20.0, 30.0, 40.0, None]
CITIES = ["b", "a", "b", "a", "c"]


@pytest.fixture
def folder(tmp_path):
    user = np.repeat(np.arange(5), [len(s) for s in SEQUENCES])
    events = {"user": user, "item": np.concatenate(SEQUENCES), "timestamp": np.arange(len(user))}
    users = {"user_id": range(5), "age": pl.Series(AGES), "city": CITIES}
    write_dataset(
        tmp_path / "d",
        interactions=pl.DataFrame(events, schema=dict.fromkeys(events, pl.Int64)),
        users=pl.DataFrame(users),
        items=pl.DataFrame({"item_id": range(6)}),
        relations=pl.DataFrame({"user": [0, 1, 3], "friend": [1, 2, 4]}),
        tie_rule="none",
        time="row",
        source="test",
    )
    return tmp_path / "d"


@pytest.fixture
def dataset(folder):
    return SequenceDataset.load(folder)


def test_numbers_and_tokens(dataset):
    side = SideData(dataset)
    assert (side.num_items, side.mask_id, side.split) == (6, 6, "train")
    assert side.item_counts.tolist() == dataset.item_counts("train").tolist()
    everything = np.concatenate(SEQUENCES)
    expected = np.bincount(everything, minlength=6).tolist()
    assert SideData(dataset, "all").item_counts.tolist() == expected


def test_gather_gives_the_rows_of_columns(dataset):
    side = SideData(dataset)
    side.user_columns["age"] = torch.arange(5) * 10.0
    side.user_columns["both"] = torch.arange(10).view(5, 2)
    batch = side.gather([3, 0, 3])
    assert lists_of(batch) == [[0, 1, 2, 3], [3, 1, 4], [0, 1, 2, 3]]
    assert batch.keys.tolist() == [3, 0, 3]
    assert batch.users["age"].tolist() == [30, 0, 30]
    assert batch.users["both"].tolist() == [[6, 7], [0, 1], [6, 7]]
    assert lists_of(side.gather([3, 1], 2)) == [[2, 3], [2]]
    assert lists_of(SideData(dataset, "all").gather([1])) == [[2, 0, 1]]
    assert len(side.gather([])) == 0


def test_nothing_is_read_before_it_is_asked_for(folder, dataset):
    for name in ("users.parquet", "relations.parquet"):
        (folder / name).unlink()
    side = SideData(dataset, attributes=[Attribute("age")], labelled=[0, 1])
    assert lists_of(side.gather([1])) == [[2]] and side.item_counts.sum() == 10
    lazy = {name for name, part in vars(SideData).items() if isinstance(part, cached_property)}
    assert lazy == {
        "item_counts", "attributes", "profile_ids", "graph", "encoded", "target_index",
        "similar_items", "mean_rating", "rating_deviations", "trained_users",
    }  # fmt: skip
    assert lazy & vars(side).keys() == {"item_counts"}


def test_once_asked_for_it_is_kept(folder, dataset):
    side = SideData(dataset)
    kept = side.attributes, side.encoded, side.graph, side.item_counts
    for name in ("users.parquet", "relations.parquet"):
        (folder / name).unlink()
    for one, other in zip(
        kept, (side.attributes, side.encoded, side.graph, side.item_counts), strict=True
    ):
        assert one is other


def test_attributes_of_users_without_a_label_are_hidden(dataset):
    side = SideData(dataset, users=[0, 1, 2, 3], labelled=torch.tensor([0, 1]))
    age, city = side.attributes
    assert age.name == "age" and (age.mean, city.labels) == (25.0, ("a", "b"))
    assert age.values.isnan().tolist() == [False, False, True, True, True]
    assert city.values.tolist() == [1, 0, -1, -1, -1]
    whole, region = side.encoded
    assert whole.values.isnan().tolist() == [False] * 4 + [True], "a judge sees them"
    assert region.values.tolist() == [1, 0, 1, 0, -1], "nobody of the trained users is from c"
    assert torch.equal(whole.values[:2], age.values[:2])


def test_without_lists_all_users_are_taken(dataset):
    (age, city), (whole, _) = SideData(dataset).attributes, SideData(dataset).encoded
    assert torch.equal(age.values.nan_to_num(9), whole.values.nan_to_num(9))
    assert city.labels == ("a", "b", "c") and age.mean == 25.0


def test_chosen_attributes(dataset):
    side = SideData(dataset, attributes=[Attribute("city", top=1)])
    (city,) = side.attributes
    assert city.labels[-1] == "other" and len(city.labels) == 2


def test_profiles(dataset):
    ids = SideData(dataset).profile_ids
    assert ids[0] == ids[2] != ids[1] == ids[3] != ids[4]
    assert SideData(dataset, attributes=[Attribute("age")]).profile_ids is None, "none is discrete"


def test_profiles_of_users_without_a_label_are_hidden(dataset):
    ids = SideData(dataset, users=[0, 1, 2, 3], labelled=torch.tensor([0, 1])).profile_ids
    assert (ids >= 0).tolist() == [True, True, False, False, False]


def put(frame: pl.DataFrame, file: Path, dataset) -> None:
    """As if it had been written with the data set."""
    frame.write_parquet(file)
    dataset.schema["digests"][file.name] = digest(file)


def test_profiles_of_users_without_attributes(folder, dataset):
    users = pl.DataFrame({"user": range(5), "user_id": range(5)})
    put(users, folder / "users.parquet", dataset)
    assert SideData(dataset).profile_ids is None
    with pytest.raises(DataError, match="leave out the objective user_attributes") as caught:
        _ = SideData(dataset).attributes
    assert caught.value.file == str(folder / "users.parquet")


def test_friends_are_those_with_both_ends_labelled(dataset):
    graph = SideData(dataset).graph
    friends = [
        graph.values[a:b].tolist() for a, b in zip(graph.offsets, graph.offsets[1:], strict=False)
    ]
    assert friends == [[1], [0, 2], [1], [4], [3]]
    graph = SideData(dataset, labelled=[0, 1, 3]).graph
    assert graph.degrees(np.arange(5)).tolist() == [1, 1, 0, 0, 0]


def test_errors_name_the_file(folder, dataset):
    frame = pl.DataFrame({"user": range(5), "user_id": range(5), "one": [7] * 5})
    put(frame, folder / "users.parquet", dataset)
    users = re.escape(str(folder / "users.parquet"))
    for settings in ([], [Attribute("one")], [Attribute("two")]):
        with pytest.raises(DataError, match=rf"^{users}: column '(one|two)'"):
            _ = SideData(dataset, attributes=settings).attributes
    with pytest.raises(DataError, match=users):
        _ = SideData(dataset, attributes=[Attribute("one")]).profile_ids
    with pytest.raises(
        ValueError, match=rf"{users}.* Users are compared by all columns.*friend.*contrast"
    ):
        _ = SideData(dataset).profile_ids
    (folder / "users.parquet").unlink()
    with pytest.raises(DataError, match=rf"^{users}: file is missing"):
        _ = SideData(dataset).attributes
    with pytest.raises(ValueError, match="no two of the 2 trained users are friends"):
        _ = SideData(dataset, labelled=[0, 4]).graph
    put(pl.DataFrame({"user": [0], "friend": [9]}), folder / "relations.parquet", dataset)
    with pytest.raises(DataError, match=r"relations.parquet: user out of \[0, 5\)"):
        _ = SideData(dataset).graph
    (folder / "relations.parquet").unlink()
    missing = rf"{re.escape(str(folder))} has no relations: .* leave out the step friend"
    with pytest.raises(ValueError, match=missing):
        _ = SideData(dataset).graph


def test_a_data_set_in_memory_has_counts():
    assert SideData(dataset_of([[0, 1, 2], [1, 1]], 3)).item_counts.tolist() == [1, 2, 0]
