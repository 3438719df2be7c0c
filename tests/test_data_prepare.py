# SPDX-License-Identifier: Apache-2.0
"""prepare: filters, ids, order, the files on disk; and the real data sets where present."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrec
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.graph import SocialGraph
from fastrec.data.prepare import prepare
from fastrec.data.prepare.k_core import core_counts
from fastrec.data.prepare.readers import RawData
from fastrec.data.prepare.side_tables import read_attributes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def raw(events, ordered=False, **more):
    """events: (user, item, timestamp[, rating]) rows."""
    names = ["user_id", "item_id", "timestamp", "rating"][: len(events[0])]
    frame = pl.DataFrame(events, schema=names, orient="row")
    return RawData("here", frame, ordered=ordered, **more)


def sequences(dataset):
    values, offsets = dataset.values.tolist(), dataset.offsets.tolist()
    return [values[a:b] for a, b in pairwise(offsets)]


def k_core_mask(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """bool [E]: the events of the k-core by `core_counts`, which gives how many each end has."""
    by_user, by_item = (np.bincount(ids, minlength=1) for ids in (user, item))
    by_user, by_item = core_counts(lambda: [(user, item)], by_user, by_item, k)
    return (by_user[user] > 0) & (by_item[item] > 0)


def naive_k_core(events, k):
    """Remove one user or item at a time."""
    events = list(events)
    while True:
        for place in (0, 1):
            for key in {event[place] for event in events}:
                if sum(event[place] == key for event in events) < k:
                    events = [event for event in events if event[place] != key]
                    break
            else:
                continue
            break
        else:
            return events


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_k_core_is_that_of_one_removal_at_a_time(events, k):
    user, item = np.array(events).T
    kept = [tuple(event) for event in np.array(events)[k_core_mask(user, item, k)].tolist()]
    assert kept == naive_k_core(events, k)


def test_the_k_core_of_a_chain_takes_linear_work(monkeypatch):
    """Users and items in a row, each sharing one event with the next: passes over all events would
    be as many as users. Counted are the events that passes and queue look at."""
    users = 30_000
    user = np.repeat(np.arange(users), 2)
    item = np.concatenate([[u, u + 1] for u in range(users)])
    looked = []
    count = np.bincount
    monkeypatch.setattr(np, "bincount", lambda x, **k: looked.append(len(x)) or count(x, **k))
    assert not k_core_mask(user, item, 2).any()
    assert sum(looked) < 50 * len(user)
    core = k_core_mask(np.append(user, [users] * 2), np.append(item, [users + 5] * 2), 2)
    assert core.tolist() == [False] * len(user) + [True, True]


def test_ids_ascend_and_events_are_sorted_stably(tmp_path):
    events = [(9, 30, 5), (2, 10, 7), (9, 20, 4), (2, 30, 6), (9, 10, 4), (2, 20, 6)]
    report = prepare(raw(events), tmp_path / "d")
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_ids().tolist() == [2, 9]
    assert dataset.item_ids().tolist() == [10, 20, 30]
    # Equal times keep the order of the rows: 20 before 10, 30 before 20.
    assert sequences(dataset) == [[2, 1, 0], [1, 0, 2]]
    table = pl.read_parquet(tmp_path / "d" / "interactions.parquet")
    assert table["user"].to_list() == [0, 0, 0, 1, 1, 1]
    assert table["item"].to_list() == [2, 1, 0, 1, 0, 2]
    assert table["timestamp"].to_list() == [6, 6, 7, 4, 4, 5]
    assert "stable by (timestamp, row" in dataset.schema["tie_rule"] and report.removed == {}


def test_a_source_in_order_is_never_sorted(tmp_path):
    events = [(1, 3, 5), (2, 9, 1), (1, 2, 4), (1, 9, 5), (2, 2, 1)]
    prepare(raw(events, ordered=True), tmp_path / "d")
    dataset = SequenceDataset.load(tmp_path / "d")
    assert sequences(dataset) == [[1, 0, 2], [2, 0]]
    assert "never sorted" in dataset.schema["tie_rule"]


def test_text_ids_and_places_as_time(tmp_path):
    frame = pl.DataFrame({"user_id": ["b", "a", "b"], "item_id": ["y", "y", "é"]})
    prepare(RawData("here", frame, ordered=True), tmp_path / "d")
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_ids().tolist() == ["a", "b"] and dataset.item_ids().tolist() == ["y", "é"]
    assert sequences(dataset) == [[0], [0, 1]]
    table = pl.read_parquet(tmp_path / "d" / "interactions.parquet")
    assert table["timestamp"].to_list() == [0, 0, 1]
    with pytest.raises(DataError, match="in order"):
        prepare(RawData("here", frame), tmp_path / "e")


def test_filters_are_counted_and_printed(tmp_path):
    events = [(user, item, item, 4.0) for user in (1, 2, 3) for item in (1, 2, 3)]
    events += [(1, 7, 9, 4.0), (4, 1, 1, 4.0), (2, 3, 10, 2.0), (5, 8, 1, 1.0)]
    report = prepare(raw(events), tmp_path / "d", k_core=3, min_rating=3)
    assert report.before == {"users": 5, "items": 5, "interactions": 13}
    assert report.after == {"users": 3, "items": 3, "interactions": 9}
    assert report.removed == {
        "interactions rated below 3": 2,
        "interactions (1 users, 1 items) outside the 3-core": 2,
    }
    assert report.lengths == {"min": 3, "median": 3, "mean": 3, "max": 3}
    text = str(report)
    for part in ("here ->", "13 ->", "2 interactions rated below 3", "min 3, median 3, mean 3.0"):
        assert part in text
    schema = json.loads((tmp_path / "d" / "schema.json").read_text())
    assert schema["filters"]["k_core"] == 3
    assert schema["filters"]["removed"] == report.removed
    assert schema["columns"]["interactions"]["rating"] == "Float32"
    # The k-core may be empty, and every filter can leave nothing.
    with pytest.raises(DataError, match=r"here: no interaction is left in the 4-core"):
        prepare(raw(events), tmp_path / "e", k_core=4)
    with pytest.raises(DataError, match="no interaction is left"):
        prepare(raw(events), tmp_path / "e", min_rating=5)
    with pytest.raises(DataError, match="column 'rating'"):
        prepare(raw([event[:3] for event in events]), tmp_path / "e", min_rating=3)
    assert not (tmp_path / "e").exists()


def test_side_tables_are_said(tmp_path):
    events = [(user, item, item) for user in (1, 2) for item in range(3)]
    users = pl.DataFrame({"user_id": [1, 2], "age": [3, 4], "town": ["a", "b"]})
    friends = pl.DataFrame({"user": [1], "friend": [2]})
    report = prepare(raw(events), tmp_path / "d", user_attributes=users, relations=friends)
    said = str(report)
    assert "\n  users have age, town\n  relations: 1\n" in said
    assert "items have" not in said
    assert "have" not in str(prepare(raw(events), tmp_path / "e")).replace("fewer", "")


def test_max_users_and_short_users(tmp_path):
    events = [(user, item, item) for user in (3, 1, 2) for item in range(user)]
    report = prepare(raw(events), tmp_path / "d", max_users=2)
    assert report.after == {"users": 2, "items": 2, "interactions": 3}
    assert report.removed == {"interactions beyond 2 users": 3}
    assert report.num_short_users == 2 and "2 users have fewer than 3 events" in str(report)
    assert SequenceDataset.load(tmp_path / "d").num_short_users == 2


def test_max_users_are_users_with_an_event_that_is_rated_well(tmp_path):
    events = [(user, item, item, 4.0) for user in (2, 3, 4) for item in range(user - 1)]
    events += [(1, 5, 1, 1.0), (2, 5, 9, 2.0)]
    report = prepare(raw(events), tmp_path / "d", max_users=2, min_rating=3)
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_ids().tolist() == [2, 3] and sequences(dataset) == [[0], [0, 1]]
    assert report.removed == {"interactions rated below 3": 2, "interactions beyond 2 users": 3}


def test_attributes_and_relations(tmp_path):
    events = [(1, 10, 1), (2, 10, 1), (5, 11, 1)]
    (tmp_path / "users.csv").write_text("user,age\n5,50\n1,10\n8,80\n")
    (tmp_path / "items.json").write_text('{"11": [4, 4, 1], "12": [2]}')
    (tmp_path / "links.tsv").write_text("a\tb\n1\t5\n5\t8\n2\t1\n1\t2\n2\t2\n")
    report = prepare(
        raw(events),
        tmp_path / "d",
        user_attributes=tmp_path / "users.csv",
        item_attributes=tmp_path / "items.json",
        relations=tmp_path / "links.tsv",
    )
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.user_attributes().rows() == [(0, 1, 10), (1, 2, None), (2, 5, 50)]
    assert dataset.item_attributes().rows() == [(0, 10, None), (1, 11, [4, 1])]
    assert dataset.relations().tolist() == [[0, 2], [1, 0], [0, 1], [1, 1]]
    graph = SocialGraph.from_dataset(dataset)
    assert (graph.values.tolist(), graph.offsets.tolist()) == ([1, 2, 0, 0], [0, 2, 3, 4])
    assert report.removed == {
        "attribute rows of users without interactions": 1,
        "attribute rows of items without interactions": 1,
        "relations with an end without interactions": 1,
    }
    with pytest.raises(DataError, match="column 'user_id', row 1: expected an integer id, got 'x'"):
        frame = pl.DataFrame({"user_id": ["x"], "age": [3]})
        prepare(raw(events), tmp_path / "e", user_attributes=frame)


def test_attribute_frames_are_checked(tmp_path):
    events = [(1, 10, 1), (2, 10, 1)]
    twice = pl.DataFrame({"user_id": [1, 1], "age": [3, 4]})
    with pytest.raises(DataError, match="listed twice"):
        prepare(raw(events), tmp_path / "d", user_attributes=twice)
    with pytest.raises(DataError, match="column 'user_id'"):
        prepare(raw(events), tmp_path / "d", user_attributes=pl.DataFrame({"age": [3]}))
    own = pl.DataFrame({"user_id": [1, 2], "age": [3, 4]})
    with pytest.raises(DataError, match="column 'age'"):
        prepare(raw(events, users=own), tmp_path / "d", user_attributes=own)


def test_attributes_of_the_source_about_nobody_name_it(tmp_path):
    stranger = pl.DataFrame({"user_id": [7], "age": [3]})
    with pytest.raises(DataError, match="^here: column 'user_id': none of its 1 ids occurs"):
        prepare(raw([(1, 10, 1)], users=stranger), tmp_path / "d")
    links = pl.DataFrame({"user": [7], "friend": [8]})
    with pytest.raises(DataError, match="^here: column 'user': none of its 1 ids occurs"):
        prepare(raw([(1, 10, 1)], relations=links), tmp_path / "d")
    with pytest.raises(DataError, match="^relations: column 'user': none of its 1 ids occurs"):
        prepare(raw([(1, 10, 1)]), tmp_path / "d", relations=links, na_values="text")


def test_arguments_are_checked(tmp_path):
    events = [(1, 10, 1), (2, 10, 1)]
    for options in ({"max_users": 0}, {"max_users": -1}, {"k_core": -1}):
        with pytest.raises(ValueError, match="k_core must not be negative, max_users positive"):
            prepare(raw(events), tmp_path / "d", **options)
    with pytest.raises(DataError, match=r"expected two columns of ids, got \['user_id'\]"):
        prepare(raw(events), tmp_path / "d", relations=pl.DataFrame({"user_id": [1]}))


def test_output_is_not_overwritten_by_accident(tmp_path):
    events = [(1, 10, 1), (1, 11, 2), (1, 10, 3)]
    output = tmp_path / "new" / "d"
    prepare(raw(events), output)
    with pytest.raises(FileExistsError, match="not empty"):
        prepare(raw(events), output)
    prepare(raw(events[:2]), output, overwrite=True)
    assert SequenceDataset.load(output).num_events == 2
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="not a fastrec dataset"):
        prepare(raw(events), foreign, overwrite=True)
    assert (foreign / "cat.jpg").exists()
    for other in (output / "notes.txt", output / "run" / "last.ckpt"):
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
        name = other.relative_to(output).parts[0]
        with pytest.raises(FileExistsError, match=f"will not be replaced: '{name}' would be lost"):
            prepare(raw(events), output, overwrite=True)
        assert other.read_text() == "mine" and SequenceDataset.load(output).num_events == 2
        if name == "run":
            shutil.rmtree(output / "run")
        else:
            other.unlink()
    with pytest.raises(FileExistsError, match="is a file"):
        prepare(raw(events), foreign / "cat.jpg")
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare(raw(events), empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new", "photos"]
    assert [path.name for path in output.parent.iterdir()] == ["d"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    events = [(1, 10, 1), (1, 11, 2)]
    prepare(raw(events), tmp_path / "d")
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare(raw(events), tmp_path / "d", overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        prepare(raw(events), tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert SequenceDataset.load(tmp_path / "d").num_events == 2


# Real data, beside the repository


def shared(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no folder shared/data/{name} beside the repository")
    return SHARED / name


def test_yelp_counts(tmp_path):
    folder = shared("yelp-s3")
    report = prepare(
        folder / "Yelp.txt",
        tmp_path / "d",
        format="s3rec",
        item_attributes=folder / "Yelp_item2attributes.json",
        k_core=5,
    )
    assert report.after == {"users": 30_431, "items": 20_033, "interactions": 316_354}
    assert report.removed == {}
    assert report.lengths["min"] == 5 and report.lengths["median"] == 7
    assert report.lengths["max"] == 350 and round(report.lengths["mean"], 1) == 10.4
    dataset = SequenceDataset.load(tmp_path / "d")
    assert (dataset.item_ids() == np.arange(1, 20_034)).all()
    assert (dataset.user_ids() == np.arange(1, 30_432)).all()
    first = (folder / "Yelp.txt").read_text().splitlines()[0].split()
    assert [item + 1 for item in sequences(dataset)[0]] == [int(token) for token in first[1:]]
    attributes = dataset.item_attributes()["attributes"]
    assert round(attributes.list.len().mean(), 2) == 4.84 and attributes.null_count() == 0
    # 6.66 % of the users have a test item that occurs in their history.
    test = dataset.gather(np.arange(dataset.num_users), "test")
    target = dataset.targets("test")
    seen = np.zeros(dataset.num_users, dtype=bool)
    seen[test.segment_ids()[test.values == target[test.segment_ids()]].numpy()] = True
    assert round(100 * seen.mean(), 2) == 6.66


def test_ml_100k_counts(tmp_path):
    folder = shared("ml-100k")
    report = prepare(folder, tmp_path / "d", format="recbole")
    assert report.after == {"users": 943, "items": 1_682, "interactions": 100_000}
    dataset = SequenceDataset.load(tmp_path / "d")
    events = pl.read_parquet(tmp_path / "d" / "interactions.parquet")
    assert round(events["rating"].mean(), 3) == 3.530
    same = (events["timestamp"].diff() == 0).to_numpy()[1:]
    inside = np.diff(events["user"].to_numpy()) == 0
    assert round(100 * (same & inside).sum() / inside.sum(), 1) == 51.0
    ends = dataset.offsets[1:]
    last_two = events["timestamp"].to_numpy()[ends - 1] == events["timestamp"].to_numpy()[ends - 2]
    assert round(100 * last_two.mean(), 1) == 44.0
    genders = dataset.user_attributes()["gender"].value_counts().rows()
    assert dict(genders) == {"M": 670, "F": 273}
    core = prepare(folder, tmp_path / "e", format="recbole", k_core=5)
    assert core.after == {"users": 943, "items": 1_349, "interactions": 99_287}


def test_ml_1m_counts(tmp_path):
    folder = shared("ml-1m")
    users = read_attributes(
        folder / "users.dat", "user_id", id_map=folder / "sas_to_original_users.txt"
    )
    items = read_attributes(
        folder / "movies.dat", "item_id", id_map=folder / "sas_to_original_items.txt"
    )
    report = prepare(
        folder / "ml-1m.txt",
        tmp_path / "d",
        format="pairs",
        user_attributes=users,
        item_attributes=items,
    )
    assert report.after == {"users": 6_040, "items": 3_416, "interactions": 999_611}
    assert report.lengths["max"] == 2_277 and report.lengths["median"] == 96
    dataset = SequenceDataset.load(tmp_path / "d")
    assert dataset.lengths[1977] == 2_277 and dataset.lengths[4961] == 53
    assert dict(dataset.user_attributes()["gender"].value_counts().rows()) == {"M": 4331, "F": 1709}
    assert dataset.item_attributes()["title"].null_count() == 1


def test_friends_of_lastfm(tmp_path):
    folder = shared("lastfm-social")
    prepare(
        folder / "LastFM.txt",
        tmp_path / "d",
        format="s3rec",
        item_attributes=folder / "LastFM_item2attributes.json",
        user_attributes=folder / "user_attrs.tsv",
        user_key="s3_user",
        relations=folder / "friends.tsv",
    )
    dataset = SequenceDataset.load(tmp_path / "d")
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == (1_090, 3_646, 52_551)
    graph = SocialGraph.from_dataset(dataset)
    assert len(graph.values) == 9_020 and int((np.diff(graph.offsets) > 0).sum()) == 1_026
    assert round(dataset.item_attributes()["attributes"].list.len().mean(), 1) == 12.5


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_a_rating_at_the_threshold_is_kept(tmp_path, kind):
    """4.1 in float32, as ratings are, is below 4.1 in float64, as a quantile of them is."""
    frame = pl.DataFrame(
        {"user": [1, 1, 1], "item": ["a", "b", "c"], "time": [1, 2, 3], "rating": [4.1, 3.0, 5.0]}
    )
    fastrec.prepare(frame, tmp_path / "d", min_rating=kind(4.1))
    assert sorted(SequenceDataset.load(tmp_path / "d").item_ids().tolist()) == ["a", "c"]
