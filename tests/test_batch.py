# SPDX-License-Identifier: Apache-2.0
"""The jagged batch: what moves sequences about, against lists, one event at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import GRAPH, lists_of, same, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data.batch import JaggedBatch, framed, from_sequences, np_spans, offsets_of, spans
from fastrec.data.graph import FriendSampler
from fastrec.random import Rng

SEQUENCES = [[3, 1, 4, 1, 5], [], [9], [2, 6, 5], [], [8, 7]]
sequences = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=6)


def batch_of(sequences, ids=None) -> JaggedBatch:
    """`place` numbers the events, `target` [T, 2] and `label` are columns."""
    batch = from_sequences(sequences, ids)
    place = torch.arange(len(batch.values))
    target = torch.stack([place + 1, place + 2], dim=1)
    label = torch.arange(len(batch)) * 1.5
    return replace(batch, events={"place": place, "target": target}, users={"label": label})


def with_everything() -> JaggedBatch:
    batch = batch_of(SEQUENCES)
    _, pairs = FriendSampler(GRAPH, profile=np.arange(6)).pairs_at(np.arange(6), Rng(0, 0))
    pairs = replace(pairs, real=(torch.ones(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)))
    real = torch.tensor([True, True, False, True, True, False])
    return replace(batch, pairs=pairs, real=real).with_scored()


def test_from_sequences():
    batch = from_sequences(SEQUENCES, [4, 0, 7, 2, 9, 1 << 31])
    assert lists_of(batch) == SEQUENCES and len(batch) == 6
    assert batch.offsets.tolist() == [0, 5, 5, 6, 9, 9, 11]
    assert batch.lengths.tolist() == [5, 0, 1, 3, 0, 2] and batch.max_seq_len == 5
    assert batch.keys.tolist() == batch.sample_ids.tolist() == [4, 0, 7, 2, 9, 1 << 31]
    assert batch.values.dtype == batch.offsets.dtype == batch.keys.dtype == torch.int64
    assert from_sequences([[1], [2]]).keys.tolist() == [0, 1]
    for nothing in ([], [[], []]):
        batch = from_sequences(nothing)
        assert (lists_of(batch), len(batch), batch.max_seq_len) == (nothing, len(nothing), 0)


@settings(deadline=None)
@given(sequences)
def test_positions_and_segments(lists):
    batch = from_sequences(lists)
    assert batch.positions().tolist() == [place for row in lists for place in range(len(row))]
    assert batch.segment_ids().tolist() == [b for b, row in enumerate(lists) for _ in row]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_spans(runs):
    starts, lengths = (torch.tensor([run[i] for run in runs], dtype=torch.int64) for i in (0, 1))
    offsets = offsets_of(lengths)
    assert offsets.tolist() == [sum(lengths[:b].tolist()) for b in range(len(runs) + 1)]
    expected = [place for start, number in runs for place in range(start, start + number)]
    assert spans(starts, lengths, offsets).tolist() == expected
    assert np_spans(starts.numpy(), lengths.numpy()).tolist() == expected


@settings(deadline=None)
@given(sequences.filter(bool), st.data())
def test_select(lists, data):
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    batch = batch_of(lists, range(10, 10 + len(lists))).as_view(3)
    part = batch.select(torch.tensor(rows, dtype=torch.int64))
    places = lists_of(batch, batch.events["place"])
    assert lists_of(part) == [lists[row] for row in rows]
    assert lists_of(part, part.events["place"]) == [places[row] for row in rows]
    assert part.keys.tolist() == [3 << 32 | 10 + row for row in rows]
    assert part.users["label"].tolist() == [1.5 * row for row in rows]
    assert part.max_seq_len >= max((len(lists[row]) for row in rows), default=0)


@settings(deadline=None)
@given(sequences, st.integers(0, 7))
def test_last(lists, number):
    batch = batch_of(lists)
    part = batch.last(number)
    places = lists_of(batch, batch.events["place"])
    assert lists_of(part) == [row[len(row) - min(number, len(row)) :] for row in lists]
    kept = [row[len(row) - min(number, len(row)) :] for row in places]
    assert lists_of(part, part.events["place"]) == kept
    assert part.max_seq_len <= number or part is batch
    assert torch.equal(part.keys, batch.keys) and part.users is batch.users


@settings(deadline=None)
@given(
    sequences,
    st.lists(st.integers(100, 103), max_size=2),
    st.lists(st.integers(100, 103), max_size=3),
)
def test_framed(lists, before, after):
    batch = batch_of(lists, range(5, 5 + len(lists)))
    made = framed(batch, before, after)
    assert lists_of(made) == [before + row + after for row in lists]
    assert made.max_seq_len == batch.max_seq_len + len(before) + len(after)
    assert made.keys is batch.keys and made.users is batch.users
    for name, fill in (("place", 0), ("target", [-100, -100])):
        column, now = batch.events[name], made.events[name]
        ends = [[fill] * len(before), [fill] * len(after)]
        expected = [ends[0] + row + ends[1] for row in lists_of(batch, column)]
        assert lists_of(made, now) == expected and now.dtype == column.dtype


def test_with_scored():
    batch = from_sequences([[1, 2], [], [3, 4, 5]])
    assert batch.with_scored() is batch, "no targets"
    target = torch.tensor([-100, 0, 7, -100, 2])
    assert replace(batch, events={"target": target}).with_scored().scored.tolist() == [1, 2, 4]
    target = torch.tensor([[-100, -100], [-100, 3], [4, -100], [-100, -100], [5, 6]])
    made = replace(batch, events={"target": target}).with_scored()
    assert made.scored.tolist() == [1, 2, 4] and made.events["target"] is target
    none = replace(batch, events={"target": torch.full((5,), -100)}).with_scored()
    assert none.scored.shape == (0,) and none.scored.dtype == torch.int64


def test_views():
    batch = from_sequences([[1], [2, 3]], [7, (1 << 32) - 1])
    viewed = batch.as_view(3)
    assert viewed.keys.tolist() == [3 << 32 | 7, 3 << 32 | (1 << 32) - 1]
    assert torch.equal(viewed.sample_ids, batch.keys) and viewed.values is batch.values
    assert viewed.as_view(65534).as_view(0).keys.tolist() == batch.keys.tolist()
    copies = batch.as_views(3)
    assert lists_of(copies) == [[1], [2, 3]] * 3
    assert (copies.keys >> 32).tolist() == [0, 0, 1, 1, 2, 2]
    assert copies.sample_ids.tolist() == [7, (1 << 32) - 1] * 3
    assert same(batch.as_views(1), batch)
    for wrong in (-1, 65535):
        with pytest.raises(ValueError, match=rf"a view is a number in \[0, 65535\), got {wrong}"):
            batch.as_view(wrong)


def test_cat():
    one, other = batch_of([[1, 2], []], [5, 6]), batch_of([[], [3]], [7, 8]).as_view(2)
    none, third = batch_of([]), batch_of([[4, 5, 6]], [9])
    other.events["rating"] = torch.ones(1)
    third.events["position"] = torch.tensor([2, 0, 1])
    other.users["city"] = torch.ones(2)
    made = JaggedBatch.cat([one, other, none, third])
    assert lists_of(made) == [[1, 2], [], [], [3], [4, 5, 6]] and made.max_seq_len == 3
    assert made.offsets.dtype == torch.int64
    assert made.keys.tolist() == [5, 6, 2 << 32 | 7, 2 << 32 | 8, 9]
    assert {*made.events} == {"place", "target", "rating", "position"}
    assert list(made.users) == ["label"]
    assert str(made.events["rating"].tolist()) == "[nan, nan, 1.0, nan, nan, nan]"
    assert made.events["position"].tolist() == [0, 1, 0, 2, 0, 1], "their own places where not told"
    assert made.events["place"].tolist() == [0, 1, 0, 0, 1, 2]
    assert made.events["target"].shape == (6, 2)
    assert made.users["label"].tolist() == [0, 1.5, 0, 1.5, 0]
    assert JaggedBatch.cat([one]) is one
    everything = with_everything()
    made = JaggedBatch.cat([everything, everything])
    assert made.pairs is made.scored is made.real is None


@pytest.mark.parametrize("lists", [SEQUENCES, [[]], []])
def test_what_cat_joins_select_takes_apart(lists):
    batch = batch_of(lists)
    both = JaggedBatch.cat([batch, batch.as_view(1)])
    count = torch.arange(len(batch))
    assert same(both.select(count), batch)
    assert same(both.select(count + len(batch)), batch.as_view(1))


def test_what_speaks_of_other_events_or_sequences_is_left_out():
    """`scored` counts events, `pairs` sequences."""
    batch = with_everything()
    for made in (batch.last(2), framed(batch, [100]), batch.select(torch.tensor([2, 0]))):
        assert made.scored is None
    assert framed(batch) is batch
    assert batch.last(2).pairs is batch.pairs and framed(batch, [100]).pairs is batch.pairs
    made = batch.select(torch.tensor([2, 0]))
    assert made.pairs is None and made.real.tolist() == [False, True]


def test_to_moves_everything():
    batch = with_everything()
    moved = batch.to("meta")
    before, after = tensors_of(batch), tensors_of(moved)
    assert before.keys() == after.keys() and len(before) > 16
    for name, value in after.items():
        assert value.device.type == "meta" and value.shape == before[name].shape, name
    assert moved.max_seq_len == batch.max_seq_len
    assert same(batch.to("cpu"), batch)
    assert batch_of([[1]]).to("meta").scored is None
