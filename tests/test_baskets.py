# SPDX-License-Identifier: Apache-2.0
"""Next baskets, and positions and segments that a step gives: against plain Python."""

from dataclasses import replace

import numpy as np
import polars
import pytest
import torch
from builders import lists_of, model_of
from torch.nn import functional as F

import fastrec
from fastrec.data.batch import framed, from_sequences
from fastrec.data.errors import DataError
from fastrec.data.side import Shard, SideData
from fastrec.data.steps.baskets import Baskets
from fastrec.nn.item_parts import Segment
from fastrec.nn.items import Items
from fastrec.objectives.follows import Follows
from fastrec.random import Rng, draws
from fastrec.training.config import Recipe

RNG = Rng(3, 5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Users of 3 to 12 events, several at a time; user 0 has one basket."""
    generator, rows = np.random.default_rng(0), []
    for user in range(40):
        time = 0
        for _ in range(generator.integers(3, 13)):
            time += int(generator.integers(0, 2)) if user else 0
            rows.append((user, int(generator.integers(30)), time))
    frame = polars.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    folder = tmp_path_factory.mktemp("baskets") / "data"
    fastrec.prepare(frame, folder, timestamp="timestamp", on_duplicate="keep")
    return fastrec.SequenceDataset.load(folder)


def side_of(dataset, max_len=20) -> SideData:
    side = SideData(dataset, event_columns=["time_gap"])
    side.shard = Shard(np.empty(0, np.int64), max_len=max_len)
    return side


def baskets_of(side: SideData, user: int) -> list[list[int]]:
    batch = side.gather([user], side.shard.max_len)
    made: list[list[int]] = []
    for place, (item, gap) in enumerate(
        zip(batch.values.tolist(), batch.events["time_gap"].tolist(), strict=True)
    ):
        if place and gap == 0:
            made[-1].append(item)
        else:
            made.append([item])
    return made


def one(key: int, row: int, site: str) -> int:
    return int(draws(RNG, torch.tensor([key]), row, torch.tensor([0]), site=site)[0])


def oracle(side: SideData, key: int, follow: float):
    user, num_items = key & 0xFFFFFFFF, side.num_items
    mine = baskets_of(side, user)
    others = [each for each in side.trained_users.tolist() if each != user]
    drawn = (one(key, 0, "basket_user") << 16 | one(key, 1, "basket_user")) * len(others) >> 32
    theirs = baskets_of(side, others[drawn]) if others else []
    if not mine:
        return [], [], [], -1
    if len(mine) == 1:
        return mine[0], [0] * len(mine[0]), [0] * len(mine[0]), -1
    pick = one(key, 0, "basket") * (len(mine) - 1) >> 16
    room = side.shard.max_len
    follows = not others or one(key, 2, "basket") < round(follow * 65536)
    second = mine[pick + 1] if follows else theirs[one(key, 1, "basket") * len(theirs) >> 16]
    first = mine[pick]
    while len(first) + 1 + len(second) > room:
        first, second = (first[:-1], second) if len(first) > len(second) else (first, second[:-1])
    return (
        [*first, num_items + 2, *second],
        [0] * (len(first) + 1) + [1] * len(second),
        [0] * len(first) + [1] + [2] * len(second),
        int(follows),
    )


@pytest.mark.parametrize("follow", [0.5, 0.0, 1.0])
@pytest.mark.parametrize(("view", "room"), [(0, 20), (2, 20), (0, 4), (1, 3)])
def test_baskets_against_one_user_at_a_time(dataset, follow, view, room):
    side = side_of(dataset, room)
    batch = side.gather(torch.arange(40), room).as_view(view)
    before = batch.values.clone()
    made = Baskets(follow)(batch, RNG, side)
    assert torch.equal(batch.values, before) and list(batch.events) == ["time_gap"]
    pieces = {
        name: [part.tolist() for part in column.split(made.lengths.tolist())]
        for name, column in (("values", made.values), *made.events.items())
    }
    assert made.max_seq_len <= room and (room == 20 or made.max_seq_len == room)
    kinds = set()
    for row, key in enumerate(batch.keys.tolist()):
        values, segment, position, follows = oracle(side, key, follow)
        assert pieces["values"][row] == values
        assert pieces["segment"][row] == segment and pieces["position"][row] == position
        assert made.users["follows"][row] == follows
        assert follows < 0 or set(segment) == {0, 1}, "a basket was cut off"
        kinds.add(follows)
    assert kinds == {0.5: {-1, 0, 1}, 0.0: {-1, 0}, 1.0: {-1, 1}}[follow]
    alone = Baskets(follow)(batch.select(torch.tensor([7])), RNG, side)
    assert alone.values.tolist() == pieces["values"][7]
    empty = Baskets()(side.gather([], room), RNG, side)
    assert len(empty) == 0 and len(empty.values) == 0


def test_what_parts_the_baskets_has_nothing_of_an_event(dataset):
    """Rating and gap of the item that really comes next stood there."""
    side = side_of(dataset)
    batch = side.gather(torch.arange(40), 20)
    rating = torch.arange(len(batch.values)).float()
    columns = {"rating": rating, "rating_target": rating, "target": batch.values}
    made = Baskets()(replace(batch, events={**batch.events, **columns}), RNG, side)
    parting = made.values == dataset.num_items + 2
    assert parting.sum() == (made.users["follows"] >= 0).sum() > 30
    for name in ("rating", "rating_target", "time_gap"):
        assert made.events[name][parting].isnan().all(), name
        assert not made.events[name][~parting].isnan().all(), name
    assert (made.events["target"][parting] == -100).all()
    assert (made.events["segment"][parting] == 0).all()
    assert (made.events["position"][parting] == 1).all()


def test_where_there_is_nobody_else_the_next_basket_follows(dataset):
    side = side_of(dataset)
    side.trained_users = torch.tensor([3])
    batch = side.gather([3, 7], 20).as_view(1)
    made = Baskets(0.0)(batch, RNG, side)
    assert made.users["follows"].tolist() == [1, 0], "7 gets a basket of 3"
    expected = [oracle(side, key, 0.0) for key in batch.keys.tolist()]
    assert lists_of(made) == [values for values, *_ in expected]
    assert [follows for *_, follows in expected] == [1, 0]


def test_two_baskets_and_what_parts_them_need_three_places(dataset):
    side = side_of(dataset, 2)
    with pytest.raises(ValueError, match="baskets needs model.max_len of at least 3, got 2"):
        Baskets()(side.gather([1], 2), RNG, side)


def test_without_times_there_are_no_baskets(tmp_path):
    frame = polars.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4]})
    fastrec.prepare(frame, tmp_path / "data", ordered=True)
    dataset = fastrec.SequenceDataset.load(tmp_path / "data")
    with pytest.raises(DataError, match="has no times"):
        side_of(dataset).gather([0], 5)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_encoder_reads_the_positions_that_are_given(pre_norm, dropout):
    """Bidirectional states do not change when events change places and keep their positions."""
    model = model_of(dropout=dropout, layers=2, heads=2, pre_norm=pre_norm)
    batch = from_sequences([[3, 5, 7, 2], [1, 4]])
    order = torch.tensor([2, 0, 3, 1, 5, 4])
    events = {"position": batch.positions()[order]}
    moved = replace(batch, values=batch.values[order], events=events)
    torch.testing.assert_close(model.encode(moved).states, model.encode(batch).states[order])
    natural = replace(batch, events={"position": batch.positions()})
    rng = Rng(1, 2)
    assert (
        not torch.equal(model.encode(moved, rng).states, model.encode(moved).states) or not dropout
    )
    torch.testing.assert_close(model.encode(natural, rng).states, model.encode(batch, rng).states)


def test_tokens_keep_their_own_positions():
    batch = from_sequences([[3, 5, 7], []])
    batch = replace(batch, events={"position": torch.tensor([2, 0, 0])})
    made = framed(batch, [21], [22, 23])
    assert made.events["position"].tolist() == [0, 3, 1, 1, 4, 5, 0, 1, 2]
    assert framed(from_sequences([[3]]), [21]).places().tolist() == [0, 1]


def test_views_with_and_without_positions_are_encoded_together():
    model = model_of(dropout=0.0, layers=2, heads=2, causal=True)
    plain = from_sequences([[3, 5, 7], [2]])
    given = replace(plain.as_view(1), events={"position": torch.tensor([2, 0, 1, 0])})
    given.events["target"] = torch.zeros(4, 2, dtype=torch.int64)
    plain.events["target"] = torch.zeros(4, dtype=torch.int64)
    both = model.encode_views({"a": plain, "b": given})
    torch.testing.assert_close(both["a"].states, model.encode(plain).states)
    torch.testing.assert_close(both["b"].states, model.encode(given).states)
    assert both["b"].batch is given


def test_segments_are_part_of_the_input():
    items = Items(segment=Segment(width=8), combine="sum")
    model = model_of(items=items)
    torch.nn.init.normal_(model.item_input.levels["segment"].weight)
    batch = from_sequences([[3, 5, 7]])
    given = replace(batch, events={"segment": torch.tensor([0, 1, -1])})
    ids, vectors = model.item_embedding.weight, model.item_input.levels["segment"].weight
    found = model.item_input(given).dense()
    torch.testing.assert_close(found, ids[[3, 5, 7]] + vectors[[0, 1, 2]])
    torch.testing.assert_close(model.item_input(batch).dense(), ids[[3, 5, 7]] + vectors[2])


def test_the_loss_of_what_follows():
    model = model_of(tokens=["cls"], layers=1)
    objective = Follows().build(model, None)
    batch = model.frame(from_sequences([[3, 5], [7], [2, 4]]))
    encoded = model.encode(replace(batch, users={"follows": torch.tensor([1, -1, 0])}))
    loss, count = objective(model, RNG, encoded)["follows"]
    score = objective.linear(encoded.states[batch.offsets[:-1]]).squeeze(1)[[0, 2]]
    label = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(score, label))
    assert int(count) == 2
    none = replace(batch, users={"follows": torch.tensor([-1, -1, -1])})
    loss, count = objective(model, RNG, model.encode(none))["follows"]
    assert loss == 0 and loss.requires_grad and int(count) == 0
    padding = replace(encoded.batch, real=torch.tensor([True, True, False]))
    assert int(objective(model, RNG, model.encode(padding))["follows"][1]) == 1
    with pytest.raises(ValueError, match="not made by the step baskets"):
        objective(model, RNG, model.encode(batch))


def test_what_a_recipe_cannot_mean():
    gru = {"model": {"encoder": {"transformer": None, "gru": {}}}}
    with pytest.raises(ValueError, match="permute needs an encoder that reads positions: Gru"):
        Recipe.load("ida-sr", **gru)
    with pytest.raises(ValueError, match=r"items\.segment has no effect"):
        Recipe.load("sasrec", model={"items": {"segment": {}}})
