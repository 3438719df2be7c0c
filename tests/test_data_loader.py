# SPDX-License-Identifier: Apache-2.0
"""The loader: order from (seed, epoch) only, resumable anywhere, complete and disjoint."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from builders import dataset_of, lists_of, same

from fastrec.data.batch import framed
from fastrec.data.loader import SequenceLoader, epoch_order
from fastrec.data.side import SideData
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views
from fastrec.random import Rng, draws, sort_keys


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    return dataset_of(
        [rng.integers(0, 20, length).tolist() for length in rng.integers(0, 9, 60)], 20
    )


def loader_of(dataset, split="train", views=None, max_len=5, **options) -> SequenceLoader:
    views = {"main": []} if views is None else views
    made = Views(views, partial(framed, before=[21]), SideData(dataset, split), max_len)
    return SequenceLoader(made, **options)


def users_of(batches):
    return [user for batch in batches for user in batch["main"].sample_ids.tolist()]


def ids(batches):
    return [batch["main"].sample_ids.tolist() for batch in batches]


def same_views(one, other):
    return list(one) == list(other) and all(same(one[name], other[name]) for name in one)


def test_an_epoch_holds_each_user_once(dataset):
    loader = loader_of(dataset, batch_size=16)
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
    rng = Rng(7, 3)
    lanes = [draws(rng, sample, 0, torch.full((50,), col), site="epoch_order") for col in range(4)]
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


@pytest.mark.parametrize("options", [{}, {"steps_per_pass": 5}, {"shuffle": False}])
def test_resume_in_the_middle_of_an_epoch(dataset, options):
    def make():
        return loader_of(
            dataset, views={"main": [Mask()], "b": [NextItem()]}, batch_size=7, seed=4, **options
        )

    whole = make()
    stream = [batch for _ in range(4) for batch in whole]
    for start in (0, 1, 5, 11, len(stream) - 1):
        resumed = make()
        resumed.set_step(start)
        passes = -(-len(stream) // len(resumed)) - start // len(resumed)
        rest = [batch for _ in range(passes) for batch in resumed]
        assert len(rest) == len(stream) - start
        assert all(same_views(a, b) for a, b in zip(rest, stream[start:], strict=True))
        assert resumed.step == len(stream)
    assert same_views(make().batch_at(9), stream[9])


def test_leaving_early_goes_on_from_there(dataset):
    loader, whole = (loader_of(dataset, batch_size=7) for _ in range(2))
    taken = list(itertools.islice(loader, 3))
    assert loader.step == 3
    assert all(same_views(a, b) for a, b in zip(taken + list(loader), whole, strict=True))


def test_the_users_that_are_asked_for(dataset):
    users = dataset.users("test")[:17]
    loader = loader_of(dataset, "test", batch_size=5, users=users, shuffle=False)
    assert [len(batch["main"]) for batch in loader] == [5, 5, 5, 2]
    assert users_of(loader) == users.tolist() == users_of(loader)
    shuffled = loader_of(dataset, "test", batch_size=5, users=users)
    assert sorted(users_of(shuffled)) == sorted(users.tolist())


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_batches_are_the_views_of_gathered_users(dataset, split):
    loader = loader_of(dataset, split, {"main": [], "next": [NextItem()]}, 3, batch_size=9, seed=2)
    order = epoch_order(dataset.users(split), 2, 0)
    for step, batch in enumerate(loader):
        gathered = dataset.gather(order[9 * step : 9 * step + 9], split, 4)
        assert lists_of(batch["next"]) == [[21, *row[:-1]] for row in lists_of(gathered)]
        assert lists_of(batch["main"]) == [[21, *row[-3:]] for row in lists_of(gathered)]
        assert torch.equal(batch["main"].keys, gathered.keys)
        assert torch.equal(batch["next"].keys, gathered.keys | 1 << 32)


def test_steps_draw_by_seed_and_global_step(dataset):
    """In every epoch others, of a user that stands in the same place too."""

    def masked(seed, step):
        options = {"batch_size": 60, "shuffle": False, "seed": seed}
        return loader_of(dataset, views={"main": [Mask()]}, **options).batch_at(step)["main"]

    plain = loader_of(dataset, batch_size=60, shuffle=False).batch_at(0)["main"]
    mask = partial(Mask(), side=SideData(dataset))
    for seed, step in ((0, 0), (0, 1), (5, 1)):
        inner = plain.values < 20
        users = dataset.gather(plain.keys, "train", 5)
        expected = mask(users, Rng(seed, step))
        assert torch.equal(masked(seed, step).values[inner], expected.values)
    assert not torch.equal(masked(0, 0).values, masked(0, 1).values)


def test_ranks_share_each_batch(dataset):
    whole = ids(loader_of(dataset, batch_size=8))
    parts = [ids(loader_of(dataset, batch_size=8, rank=r, world_size=3)) for r in range(3)]
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
        ({"users": []}, "there is no user to load in split 'train'"),
        ({"steps_per_pass": 0}, "steps_per_pass"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ):
        with pytest.raises(ValueError, match=match):
            loader_of(dataset, **{"batch_size": 7} | options)
    with pytest.raises(ValueError, match="negative"):
        loader_of(dataset, batch_size=7).set_step(-1)
