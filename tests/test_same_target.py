# SPDX-License-Identifier: Apache-2.0
"""`same_target`: each draw against a list of all training prefixes, who may be drawn, and what a
view with it holds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import Known, dataset_of, lists_of, loader_of, model_of, same, tensors_of

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import Shard, SideData
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.parts import Step
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.target_index import TargetIndex
from fastrec.data.views import Again
from fastrec.random import Rng, draws

RNG = Rng(3, 5)
V = 9


def sequences_of(seed: int, users: int = 40) -> list[list[int]]:
    """Of 0 to 11 of 9 items, so that a user has an item twice; item 8 is nobody's."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 8, generator.integers(0, 12)).tolist() for _ in range(users)]


def side_of(sequences, split: str = "all", room: int | None = None, labelled=None) -> SideData:
    side = SideData(dataset_of(sequences, V), split, labelled=labelled)
    side.shard = Shard(np.empty(0, np.int64), max_len=room)
    return side


def prefixes_of(sequences, users) -> list[tuple[int, int]]:
    """(user, number of its items): every training prefix of two items or more."""
    return [(u, n) for u in users for n in range(2, len(sequences[u]) + 1)]


def expected(sequences, key: int, room, labelled) -> list[int]:
    """The view of one user, by a list of all prefixes."""
    user = key & 0xFFFFFFFF
    own = sequences[user]
    if len(own) < 2:
        return own[-room:] if room else own
    others = [
        (u, n)
        for u, n in prefixes_of(sequences, sorted(labelled))
        if sequences[u][n - 1] == own[-1] and (u, n) != (user, len(own))
    ]
    user, number = user, len(own)
    if others:
        zero, keys = torch.tensor([0]), torch.tensor([key])
        high, low = (int(draws(RNG, keys, row, zero, site="same_target")) for row in (0, 1))
        user, number = others[(high << 16 | low) * len(others) >> 32]
    return sequences[user][:number][-room:] if room else sequences[user][:number]


@pytest.mark.parametrize("view", [0, 3])
@pytest.mark.parametrize("room", [None, 1, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_list_of_all_prefixes(seed, room, view):
    sequences = sequences_of(seed)
    labelled = range(40) if seed % 2 else [*range(0, 40, 3), 1]
    side = side_of(sequences, "all", room, labelled)
    batch = side.gather(range(40), room).as_view(view)
    made = SameTarget()(batch, RNG, side)
    wanted = [expected(sequences, key, room, labelled) for key in batch.keys.tolist()]
    assert lists_of(made) == wanted
    changed = sum(a != b for a, b in zip(wanted, lists_of(batch), strict=True))
    assert room == 1 or changed > 20
    assert torch.equal(made.keys, batch.keys)
    assert made.max_seq_len == max(map(len, wanted))
    pairs = zip(wanted, lists_of(batch), strict=True)
    assert all(a[-1:] == b[-1:] for a, b in pairs), "both end with the same item"


def test_prefixes_are_those_of_the_split():
    """Held-out items are neither targets nor parts of a prefix."""
    sequences = [[0, 1, 2, 7, 7], [3, 4, 2, 7, 7], [5, 7, 7], [6, 2]]
    index = TargetIndex.from_dataset(dataset_of(sequences, V), "train")
    ends = [
        [int(p) for p in index.places[a:b]]
        for a, b in zip(index.offsets, index.offsets[1:], strict=False)
    ]
    # Places 0-4, 5-9, 10-12, 13-14; user 3 is too short to hold anything out.
    assert ends == [[], [1], [2, 7, 14], [], [6], [], [], [], []]
    splits = np.array([[1, 2], [5, 5], [2, 3], [2, 2]])
    index = TargetIndex.from_dataset(replace(dataset_of(sequences, V), splits=splits), "train")
    assert sorted(index.places.tolist()) == [6, 7, 8, 9, 11, 14]


def test_the_index_takes_four_bytes_an_event_and_eight_an_item():
    index = TargetIndex.from_dataset(dataset_of(sequences_of(0), V), "all")
    assert index.places.dtype == np.int32 and index.places.flags.owndata
    assert index.offsets.nbytes == 8 * (V + 1) and index.users.nbytes == 40


def test_draws_are_uniform_and_never_the_own_prefix():
    sequences = [[0, 1], [2, 1], [3, 1], [1, 1], [4, 5]]
    side = side_of(sequences)
    batch = side.gather([3, 4])
    seen: Counter = Counter()
    for step in range(2000):
        first, second = lists_of(SameTarget()(batch, Rng(1, step), side))
        seen[tuple(first)] += 1
        assert second == [4, 5], "there is no other"
    assert set(seen) == {(0, 1), (2, 1), (3, 1)}
    assert sum((n - 2000 / 3) ** 2 for n in seen.values()) / (2000 / 3) < 13.8  # 2 of freedom


def test_an_earlier_prefix_of_the_same_user_is_another_one():
    side = side_of([[1, 2, 3, 2], [4]])
    made = SameTarget()(side.gather([0, 1]), RNG, side)
    assert lists_of(made) == [[1, 2], [4]]


def test_users_who_are_held_out_are_not_drawn():
    sequences = [[0, 1], [2, 1], [3, 1]]
    side = side_of(sequences, labelled=[0, 2])
    drawn = [lists_of(SameTarget()(side.gather([0, 1]), Rng(0, n), side)) for n in range(40)]
    assert {tuple(first) for first, _ in drawn} == {(3, 1)}
    assert {tuple(second) for _, second in drawn} == {(0, 1), (3, 1)}


def test_a_user_is_the_same_in_any_batch_and_the_input_is_left_as_it_is():
    side = side_of(sequences_of(5), room=6)
    batch = side.gather(range(40), 6).as_view(1)
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    whole = SameTarget()(batch, RNG, side)
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(batch).items())
    rows = torch.tensor([30, 2, 11])
    alone = SameTarget()(batch.select(rows), RNG, side)
    assert same(alone, replace(whole.select(rows), max_seq_len=alone.max_seq_len))
    words = Rng(torch.tensor(RNG.seed), torch.tensor(RNG.step))
    assert same(SameTarget()(batch, words, side), whole)
    for other in (Rng(3, 6), Rng(4, 5)):
        assert lists_of(SameTarget()(batch, other, side)) != lists_of(whole)


@pytest.mark.parametrize("sequences", [[[], [3]], [[2], [3]], [[], []]])
@pytest.mark.parametrize("users", [[], [0], [0, 1, 0]])
def test_nothing_and_next_to_nothing(users, sequences):
    side = side_of(sequences)
    batch = side.gather(users)
    assert same(SameTarget()(batch, RNG, side), batch)


def test_columns_follow_the_drawn_events():
    sequences = [[0, 1], [2, 1]]
    dataset = dataset_of(sequences, V)
    dataset._event_columns["rating"] = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    side = SideData(dataset, "all", event_columns=["rating"])
    side.user_columns["age"] = torch.tensor([10.0, 20.0])
    made = SameTarget()(side.gather([0, 1]), RNG, side)
    assert lists_of(made) == [[2, 1], [0, 1]]
    assert made.events["rating"].tolist() == [3, 4, 1, 2]
    assert made.users["age"].tolist() == [10, 20], "those of users stay"


@pytest.mark.parametrize("before", [Crop(0.5), Mask(), NextItem()])
def test_it_is_the_first_step_of_its_view(before):
    side = side_of(sequences_of(1))
    batch = before(side.gather(range(40)), RNG, side)
    with pytest.raises(ValueError, match="same_target must be the first step of its view"):
        SameTarget()(batch, RNG, side)


def target_of(view: JaggedBatch) -> list[list[int]]:
    return [[item for item in row if item >= 0] for row in lists_of(view, view.events["target"])]


def test_a_view_predicts_last_what_the_view_of_the_user_does():
    """With `next_item`, and room for the item that it takes off."""
    sequences = sequences_of(7)
    side = Known(dataset_of(sequences, V))
    model = model_of(num_items=V, causal=True, max_len=4)
    drawn = [Step(same_target=SameTarget()), Step(next_item=NextItem())]
    views = {"main": [NextItem()], "a": [Again("main")], "b": drawn}
    loader = loader_of(model, views, side, batch_size=40)
    made = loader.batch_at(0)
    kept = 0
    for own, other in zip(target_of(made["main"]), target_of(made["b"]), strict=True):
        assert own[-1:] == other[-1:]
        kept += own != other
    assert kept > 5
    assert max(map(len, lists_of(made["b"]))) == 4, "as many items as the model reads"
    masked = {"main": [MaskLast()], "b": [SameTarget(), MaskLast()]}
    loader = loader_of(model_of(num_items=V, max_len=4), masked, side, batch_size=40)
    made = loader.batch_at(0)
    assert target_of(made["main"]) == target_of(made["b"])
