"""The loader: order from (seed, epoch) only, resumable anywhere, complete and disjoint."""

import itertools

import numpy as np
import pytest
import torch

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader, epoch_order
from fastrec.random import Rng, draws, sort_keys


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 60)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    values = rng.integers(0, 20, offsets[-1]).astype(np.int32)
    counts = {"num_users": 60, "num_items": 20, "num_interactions": len(values)}
    return SequenceDataset(None, counts, values, offsets)


def users_of(batches):
    return [user for batch in batches for user in batch.keys.tolist()]


def ids(batches):
    return [batch.keys.tolist() for batch in batches]


def same(one, other):
    tensors = ("values", "offsets", "keys")
    return one.max_seq_len == other.max_seq_len and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_an_epoch_holds_each_user_once(dataset):
    loader = SequenceLoader(dataset, batch_size=16)
    epochs = [list(loader) for _ in range(3)]
    users = dataset.users("train").tolist()
    for batches in epochs:
        assert len(batches) == len(loader) == -(-len(users) // 16)
        assert sorted(users_of(batches)) == users
    assert len({str(ids(batches)) for batches in epochs}) == 3, "another order each epoch"
    assert loader.step == 3 * len(loader)


def test_the_order_is_pinned():
    """The order must not move with a new version of anything."""
    assert epoch_order(np.arange(10), 0, 0).tolist() == [7, 9, 0, 5, 1, 2, 6, 8, 4, 3]
    assert epoch_order(np.arange(10), 0, 1).tolist() == [9, 5, 2, 3, 6, 8, 1, 7, 4, 0]
    assert epoch_order(np.arange(10), 1, 0).tolist() == [7, 1, 8, 9, 4, 5, 0, 6, 3, 2]


def test_the_keys_are_those_of_the_contract():
    sample = torch.arange(50) + (1 << 31)
    rng, cols = Rng(7, 3), [torch.full((50,), col) for col in range(4)]
    lanes = [draws(rng, sample, 0, col, site="epoch_order") for col in cols]
    words = (lanes[0] | lanes[1] << 16, lanes[2] | lanes[3] << 16)
    keys = sort_keys(rng, sample, site="epoch_order")
    assert torch.equal(keys, (words[0] >> 1) << 31 | (words[1] >> 1))


def test_the_order_of_a_subset_is_that_of_the_whole():
    whole = epoch_order(np.arange(1_000), 5, 2)
    some = np.arange(0, 1_000, 3)[::-1]
    assert epoch_order(some, 5, 2).tolist() == [user for user in whole if user % 3 == 0]


def test_the_order_is_uniform():
    """The place of user 0 among 8 over many epochs: chi-square, 7 degrees of freedom, 0.1 %."""
    places = [int(np.flatnonzero(epoch_order(np.arange(8), 3, e) == 0)[0]) for e in range(1_600)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 200) ** 2 / 200).sum() < 24.3
    pairs = {tuple(epoch_order(np.arange(3), 3, epoch)) for epoch in range(100)}
    assert len(pairs) == 6


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"steps_per_pass": 5}])
def test_resume_in_the_middle_of_an_epoch(dataset, options):
    def make():
        return SequenceLoader(dataset, batch_size=7, seed=4, max_len=5, cls_id=21, **options)

    whole = make()
    stream = [batch for _ in range(4) for batch in whole]
    for start in (0, 1, 5, 11, len(stream) - 1):
        resumed = make()
        resumed.load_state_dict({"step": start})
        passes = -(-len(stream) // len(resumed)) - start // len(resumed)
        rest = [batch for _ in range(passes) for batch in resumed]
        assert len(rest) == len(stream) - start
        assert all(same(a, b) for a, b in zip(rest, stream[start:], strict=True))
        assert resumed.state_dict() == {"step": len(stream)}
    assert same(make().batch_at(9), stream[9])


def test_leaving_early_goes_on_from_there(dataset):
    loader, whole = (SequenceLoader(dataset, batch_size=7) for _ in range(2))
    taken = list(itertools.islice(loader, 3))
    assert loader.step == 3
    assert all(same(a, b) for a, b in zip(taken + list(loader), whole, strict=True))


def test_drop_last_and_users(dataset):
    users = dataset.users("test")[:17]
    loader = SequenceLoader(dataset, "test", batch_size=5, users=users, drop_last=True)
    assert [len(batch) for batch in loader] == [5, 5, 5]
    loader = SequenceLoader(dataset, "test", batch_size=5, users=users, shuffle=False)
    assert users_of(loader) == users.tolist() == users_of(loader)
    shuffled = SequenceLoader(dataset, "test", batch_size=5, users=users)
    assert set(users_of(shuffled)) == set(users.tolist())


def test_ranks_share_each_batch(dataset):
    whole = ids(SequenceLoader(dataset, batch_size=8))
    parts = [ids(SequenceLoader(dataset, batch_size=8, rank=r, world_size=3)) for r in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        merged = [
            user for row in itertools.zip_longest(*shares) for user in row if user is not None
        ]
        assert merged == batch


def test_arguments(dataset):
    short = np.flatnonzero(dataset.lengths == 2)[0]
    for options, match in (
        ({"batch_size": 0}, "batch_size"),
        ({"users": [1, 1]}, "1 is repeated"),
        ({"users": [60]}, "user 60 is not in split"),
        ({"users": [short], "split": "test"}, f"user {short} is not in split 'test'"),
        ({"users": dataset.users("train")[:3], "drop_last": True}, "3 users give no batch of 7"),
        ({"steps_per_pass": 0}, "steps_per_pass"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ):
        with pytest.raises(ValueError, match=match):
            SequenceLoader(dataset, **{"batch_size": 7} | options)
    with pytest.raises(ValueError, match="negative"):
        SequenceLoader(dataset, batch_size=7).set_step(-1)
