# SPDX-License-Identifier: Apache-2.0
"""Data sets that are not split leave-one-out: views against a slow reference, damaged files, who
is trained and who is judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import dataset_of, lists_of, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare import prepare
from fastrec.data.splits import boundaries
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.config import Users
from fastrec.training.stage_data import held_out_users, select_users, stage_data


def with_splits(sequences, splits, num_items=10):
    splits = np.array(splits, dtype=np.int64).reshape(-1, 2)
    return replace(dataset_of(sequences, num_items), splits=splits)


@st.composite
def split_users(draw):
    """(sequences, two ends of each)."""
    sequences = draw(
        st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=8).filter(any)
    )
    ends = [sorted(draw(st.tuples(*[st.integers(0, len(s))] * 2))) for s in sequences]
    return sequences, ends


@settings(deadline=None, max_examples=200)
@given(made=split_users(), max_len=st.none() | st.integers(0, 6), data=st.data())
def test_views_against_one_user_at_a_time(made, max_len, data):
    sequences, ends = made
    dataset = with_splits(sequences, ends)
    pairs = list(zip(sequences, ends, strict=True))
    inputs = {
        "all": sequences,
        "train": [s[:train] for s, (train, _) in pairs],
        "valid": [s[:train] if train < valid else [] for s, (train, valid) in pairs],
        "test": [s[:valid] if valid < len(s) else [] for s, (_, valid) in pairs],
    }
    held_out = {
        "valid": [s[train:valid] for s, (train, valid) in pairs],
        "test": [s[valid:] for s, (_, valid) in pairs],
    }
    for name, expected in inputs.items():
        assert dataset.split_lengths(name).tolist() == [len(s) for s in expected]
        able = [user for user, s in enumerate(expected) if s]
        assert dataset.users(name).tolist() == able
        flat = [item for s in expected for item in s]
        assert dataset.item_counts(name).tolist() == [flat.count(item) for item in range(10)]
        users = data.draw(st.lists(st.sampled_from(able), max_size=8)) if able else []
        batch = dataset.gather(users, name, max_len)
        cut = [expected[user][max(0, len(expected[user]) - max_len) :] if max_len is not None
               else expected[user] for user in users]  # fmt: skip
        assert lists_of(batch) == cut and batch.keys.tolist() == users
        if name in held_out:
            targets = dataset.held_out(users, name)
            assert lists_of(targets) == [held_out[name][user] for user in users]
            if all(len(held_out[name][user]) == 1 for user in able):
                items = [held_out[name][u][0] if u in able else -1 for u in range(len(sequences))]
                assert dataset.targets(name).tolist() == items
    whole = sum(train == len(s) for s, (train, _) in pairs)
    assert dataset.num_short_users == whole


@given(lengths=st.lists(st.integers(0, 6), max_size=9))
def test_leave_one_out_is_the_split_of_two_ends(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    ends = np.stack([np.where(lengths < 3, lengths, lengths - hidden) for hidden in (2, 1)], axis=1)
    for split in ("all", "train", "valid", "test"):
        for ours, theirs in zip(
            boundaries(split, lengths, None), boundaries(split, lengths, ends), strict=True
        ):
            assert ours.tolist() == theirs.tolist()


def test_errors_name_the_user():
    dataset = with_splits([[1, 2, 3, 4], [5, 6]], [[1, 3], [2, 2]])
    with pytest.raises(ValueError, match="user 0 has 2 targets in split 'valid': `held_out`"):
        dataset.targets("valid")
    with pytest.raises(ValueError, match="user 1 has no target, or no event before it, and is not"):
        dataset.held_out([0, 1], "test")
    with pytest.raises(ValueError, match="for targets, got 'all'"):
        dataset.held_out([0], "all")


def test_another_split_is_another_run():
    one = with_splits([[1, 2, 3, 4]], [[1, 3]])
    assert one.events_hash != with_splits([[1, 2, 3, 4]], [[1, 2]]).events_hash
    assert one.events_hash != replace(one, splits=None).events_hash


def test_who_is_trained_and_who_is_judged():
    #          all in training  valid, test   test alone  no training    valid alone
    sequences = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3], [4, 5, 6], [7, 8]]
    dataset = with_splits(sequences, [[3, 3], [2, 3], [2, 2], [0, 1], [1, 2]])
    assert dataset.users("valid").tolist() == [1, 4] and dataset.users("test").tolist() == [1, 2, 3]
    chosen = recipe()
    data = stage_data(dataset, chosen, chosen.stage("pretraining"))
    assert data.users.tolist() == [0, 1, 2, 4] and data.judge.users.tolist() == [1, 4]
    assert select_users(dataset, Users()).tolist() == [1, 2, 3, 4]
    assert select_users(dataset, Users(), "test").tolist() == [1, 2, 3]
    half = Users(fraction=0.5)
    chosen = replace(chosen, users=half)
    left_out = held_out_users(dataset, half).tolist()
    data = stage_data(dataset, chosen, chosen.stage("pretraining"))
    assert len(left_out) == 2 and not set(left_out) & set(data.users.tolist())
    none = with_splits(sequences, [[3, 3], [3, 3], [3, 3], [1, 1], [2, 2]])
    with pytest.raises(ValueError, match="no user has a validation target and an event before it"):
        stage_data(none, recipe(), recipe().stage("pretraining"))


def test_profiles_are_learnt_from_users_of_one_event_too(tmp_path):
    """Nothing is held out of a sequence where users are."""
    lengths = [6] * 20 + [1, 2] * 5
    rows = "".join(f"{u},{(u + k) % 9},{k}\n" for u, n in enumerate(lengths) for k in range(n))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    profiles = "".join(f"{u},{'fm'[u % 2]}\n" for u in range(30))
    (tmp_path / "users.csv").write_text(f"user_id,gender\n{profiles}")
    source, users = tmp_path / "log.csv", tmp_path / "users.csv"
    prepare(source, tmp_path / "data", user_attributes=users, time_unit="s", format="table")
    dataset = SequenceDataset.load(tmp_path / "data")
    chosen = recipe(objectives={"p": UserAttributes()}, judge="attributes", monitor=None)
    data = stage_data(dataset, chosen, chosen.stage("pretraining"))
    assert len(data.judge) == 2 and len(data.users) == 28
    short = [user for user, length in enumerate(dataset.lengths) if length < 3]
    assert len(short) == 10 and set(short) < set(data.users.tolist())


def test_the_training_split_counts_training_events_alone():
    """What negatives, popularity and adjustments are made of."""
    dataset = with_splits([[1, 1, 2, 3], [2, 4, 4]], [[2, 3], [1, 2]], num_items=5)
    assert torch.equal(dataset.item_counts("train"), torch.tensor([0, 2, 1, 0, 0]))
