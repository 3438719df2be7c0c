# SPDX-License-Identifier: Apache-2.0
"""Steps of a view: each against one event at a time in plain Python, alone and in any batch."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from builders import Known, lists_of, same, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_steps import (
    CLS,
    MASK,
    RNG,
    SEP,
    SIDE,
    V,
    assert_same_events,
    expected_of,
    predicts,
    random_batch,
    some_of,
    with_columns,
)

from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.side import Shard
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.cut import Cut
from fastrec.data.steps.drop import Drop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.share import Schedule
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.random import Rng

STEPS = {
    "mask": Mask(),
    "mask nothing but one": Mask(0.0),
    "mask all": Mask(1.0),
    "mask 80/10/10": Mask(0.5, replace=0.8, random=0.1),
    "mask exact": Mask(0.3, exact=True),
    "mask exact up": Mask(0.3, exact=True, round="up"),
    "mask exact, some left": Mask(0.6, exact=True, round="up", leave=2),
    "mask exact 80/10/10": Mask(0.6, exact=True, replace=0.8, random=0.1),
    "mask count": Mask(count=2),
    "mask_last": MaskLast(),
    "mask_last 3": MaskLast(3),
    "next_item": NextItem(),
    "next_item last": NextItem("last"),
    "next_item 3 ahead": NextItem(ahead=3),
    "next_item last 3 ahead": NextItem("last", ahead=3),
    "cut": Cut(),
    "cut 1": Cut(1),
    "permute": Permute(),
    "crop": Crop(),
    "crop little": Crop(0.05),
    "crop up": Crop(0.4, round="up"),
    "crop nothing": Crop(1.0),
    "crop drop": Crop(drop=0.3),
    "crop drop nearly all": Crop(drop=0.999),
    "prefix": Prefix(),
    "reorder": Reorder(),
    "reorder all": Reorder(1.0),
    "reorder up": Reorder(0.6, round="up"),
    "drop": Drop(),
    "drop most": Drop(0.95),
    "one_of": OneOf([Crop(0.6), Mask(0.3), Reorder(0.6)]),
    "reorder more and more": Reorder(Schedule(0.3, 1.0, 50)),
    "crop more and more": Crop(Schedule(0.9, 0.1, 10)),
    "mask more and more": Mask(Schedule(0.0, 1.0, 20)),
    "mask exact more and more": Mask(Schedule(0.2, 0.7, 5), exact=True),
    "fill": Fill(),
    "fill many by few": Fill(0.7, among=3),
    "fill by the first": Fill(0.4, among=1),
    "fill more and more": Fill(Schedule(0.1, 0.9, 10)),
    "window": Window(share=0.5),
    "window by count": Window(count=4),
    "window more and more": Window(share=Schedule(0.2, 0.9, 10)),
    "any_of": OneOf([Crop(0.6), Mask(0.3), Reorder(0.6)], independent=True),
    "crop long ones": Crop(0.2, least=5),
    "reorder long ones": Reorder(0.8, least=5),
    "one_of by length": OneOf(
        [Crop(0.2, least=5), Mask(0.7), Reorder(0.5, least=9), Insert(), Substitute()]
    ),
    "one_of for long ones": OneOf([Crop(0.2, least=5), Reorder(0.5, least=7)]),
    "one_of with targets": OneOf([Mask(0.3), MaskLast()]),
    "substitute": Substitute(),
    "substitute many": Substitute(0.7),
    "insert": Insert(),
    "insert everywhere": Insert(1.0),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
NOT_RANDOM = ("mask all", "mask_last", "mask_last 3", "crop nothing", "cut", "cut 1")
NOT_RANDOM += ("insert everywhere",)
random_steps = pytest.mark.parametrize(
    "step", [STEPS[n] for n in STEPS if n not in NOT_RANDOM and not n.startswith("next")]
)


def check(step, batch: JaggedBatch, rng: Rng = RNG) -> None:
    made = step(batch, rng, SIDE)
    places, items, targets = expected_of(step, batch, rng)
    assert lists_of(made) == items
    places = [[place or 0 for place in row] for row in places]  # a new event has 0 in a column
    assert lists_of(made, made.events["place"]) == places
    pair = [[[2 * place, 3 * place] for place in row] for row in places]
    assert lists_of(made, made.events["pair"]) == pair, "columns of any shape follow"
    if predicts(step):
        assert lists_of(made, made.events["target"]) == targets
        assert made.events["target"].dtype == torch.int64
    else:
        assert "target" not in made.events
    assert torch.equal(made.keys, batch.keys)
    assert torch.equal(made.users["label"], batch.users["label"])
    assert made.offsets.dtype == made.values.dtype == torch.int64
    longest = max((len(row) for row in items), default=0)
    assert longest <= made.max_seq_len <= max(batch.max_seq_len, longest)


@every_step
@pytest.mark.parametrize("view", [0, 3])
def test_against_one_event_at_a_time(step, view):
    check(step, random_batch(60, view=view))
    short = from_sequences([[], [5], [], [], [6, 7], []], range(6))
    check(step, with_columns(short.as_view(view)))
    check(step, with_columns(from_sequences([[]])))
    check(step, with_columns(from_sequences([])))


@every_step
def test_the_seed_and_the_step_are_numbers_or_tensors(step):
    batch = random_batch(30)
    words = Rng(torch.tensor(RNG.seed), torch.tensor(RNG.step))
    assert same(step(batch, words, SIDE), step(batch, RNG, SIDE))


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith(("mask", "next"))])
def test_special_tokens_are_never_masked_nor_predicted(name):
    batch = random_batch(60, special=True)
    check(STEPS[name], batch)
    made = STEPS[name](batch, RNG, SIDE)
    target = made.events["target"]
    assert ((target == -100) | ((target >= 0) & (target < V))).all()
    if not name.startswith("next"):
        before = batch.values >= V
        assert torch.equal(made.values[before], batch.values[before])
        assert (target[before] == -100).all()
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    check(STEPS[name], nothing)
    assert (STEPS[name](nothing, RNG, SIDE).events["target"] == -100).all()


@pytest.mark.parametrize("name", ["drop", "drop most", "cut", "cut 1"])
def test_special_tokens_are_neither_dropped_nor_targets(name):
    batch = random_batch(60, special=True)
    check(STEPS[name], batch)
    made = STEPS[name](batch, RNG, SIDE)
    if name.startswith("cut"):
        assert (made.events["target"] < V).all()
    else:
        assert (made.values >= V).sum() == (batch.values >= V).sum() > 0


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith("fill")])
def test_special_tokens_are_not_filled(name):
    batch = random_batch(60, special=True)
    check(STEPS[name], batch)
    made = STEPS[name](batch, RNG, SIDE)
    assert torch.equal(made.values >= V, batch.values >= V)
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    assert same(STEPS[name](nothing, RNG, SIDE), nothing)


def test_a_filled_item_has_no_rating_and_targets_stay():
    batch = MaskLast()(random_batch(60), RNG, SIDE)
    columns = {"rating": torch.arange(len(batch.values)).float(), **batch.events}
    made = Fill(0.5)(replace(batch, events=columns), RNG, SIDE)
    assert torch.equal(made.events["target"], batch.events["target"])
    kept = some_left = 0
    for start, items, key in zip(
        batch.offsets.tolist(), lists_of(batch), batch.keys.tolist(), strict=False
    ):
        chosen = some_of(items, 0.5, key, RNG, "fill")
        for place in range(len(items)):
            rating = made.events["rating"][start + place]
            assert rating.isnan() if place in chosen else rating == start + place
        kept, some_left = kept + len(chosen), some_left + len(items) - len(chosen)
    assert kept > 50 and some_left > 50


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("masked", [Mask(0.4), Mask(0.4, exact=True), MaskLast(2)], ids=str)
def test_masks_and_cuts_keep_the_targets_of_each_other(masked, last):
    """A masked item is the first of the targets of its event, in either order of the steps."""
    batch = random_batch(60)
    cut = Cut(last)(batch, RNG, SIDE)
    made = masked(cut, RNG, SIDE)
    before, after, hidden = cut.events["target"], made.events["target"], made.values != cut.values
    assert after.shape == before.shape and hidden.sum() > 20
    assert torch.equal(after[~hidden], before[~hidden])
    assert torch.equal(after[hidden, 0], cut.values[hidden]) and (after[hidden, 1:] == -100).all()
    first = masked(batch, RNG, SIDE)
    first.events["at"] = torch.arange(len(first.values))
    made = Cut(last)(first, RNG, SIDE)
    place = made.offsets[1:][made.lengths > 0] - 1
    kept = torch.ones(len(made.values), dtype=torch.bool).index_fill_(0, place, False)
    after, before = made.events["target"], first.events["target"][made.events["at"]]
    assert torch.equal(after[kept, 0], before[kept]) and (after[kept, 1:] == -100).all()
    assert (before[kept] != -100).sum() > 20 or isinstance(masked, MaskLast)  # which are cut off
    alone = Cut(last)(replace(first, events={"at": first.events["at"]}), RNG, SIDE)
    assert torch.equal(after[place], alone.events["target"][place])


def test_one_of_several_steps_may_have_more_targets_than_another():
    batch = random_batch(40)
    made = OneOf([Mask(0.4), Cut(2), Cut(3)])(batch, RNG, SIDE)
    target = made.events["target"]
    assert target.shape == (len(made.values), 3)
    number = (target != -100).sum(1).bincount(minlength=4)
    assert (number[1:] > 0).all()


@every_step
def test_the_input_is_left_as_it_is(step):
    batch = random_batch(40)
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    columns = list(batch.events), list(batch.users)
    step(batch, RNG, SIDE)
    after = tensors_of(batch)
    assert before.keys() == after.keys() and (list(batch.events), list(batch.users)) == columns
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@every_step
@settings(deadline=None, max_examples=15)
@given(order=st.permutations(list(range(12))), size=st.integers(1, 12))
def test_a_sequence_is_made_the_same_in_any_batch_and_alone(step, order, size):
    batch = random_batch(12, seed=1, view=2)
    rows = torch.tensor(order[:size])
    assert_same_events(step(batch.select(rows), RNG, SIDE), step(batch, RNG, SIDE).select(rows))


@random_steps
def test_views_seeds_and_steps_differ(step):
    batch = random_batch(200)
    made = step(batch, RNG, SIDE)
    view = step(batch.as_view(1), RNG, SIDE)
    assert (lists_of(view) == lists_of(made)) == isinstance(step, Prefix), "view"
    others = {
        "seed": step(batch, Rng(4, 5), SIDE),
        "high word of the seed": step(batch, Rng(3 + (1 << 32), 5), SIDE),
        "step": step(batch, Rng(3, 6), SIDE),
    }
    for what, other in others.items():
        assert lists_of(other) != lists_of(made), what


@pytest.mark.parametrize("step", [Substitute(0.4), Insert(0.4)])
def test_special_tokens_are_like_no_item(step):
    batch = random_batch(60, special=True)
    check(step, batch)
    made, tokens = step(batch, RNG, SIDE), [[v for v in row if v >= V] for row in lists_of(batch)]
    assert [[v for v in row if v >= V] for row in lists_of(made)] == tokens
    nothing = with_columns(from_sequences([[CLS, SEP], [], [MASK]]))
    assert same(step(nothing, RNG, SIDE), nothing)


def test_items_that_are_like_no_other_stay():
    batch = with_columns(from_sequences([[0, 5, 10, 995], [15]]))
    assert same(Substitute(1.0)(batch, RNG, SIDE), batch)
    assert same(Insert(1.0)(batch, RNG, SIDE), batch)


def test_columns_of_similar_items():
    """A rating says something of its item, a time of its event."""
    batch = from_sequences([[1, 5, 2]])
    columns = {
        "target": torch.tensor([5, 2, 8]),
        "rating": torch.tensor([1.0, 2.0, 3.0]),
        "time_gap": torch.tensor([10.0, 20.0, 30.0]),
    }
    batch = replace(batch, events=columns)
    now = Substitute(1.0)(batch, RNG, SIDE)
    assert lists_of(now) == [[994, 5, 995]]
    assert now.events["rating"].nan_to_num(-1).tolist() == [-1, 2, -1]
    assert torch.equal(now.events["time_gap"], columns["time_gap"])
    assert torch.equal(now.events["target"], columns["target"])
    now = Insert(1.0)(batch, RNG, SIDE)
    assert lists_of(now) == [[994, 1, 5, 995, 2]]
    assert now.events["target"].tolist() == [-100, 5, 2, -100, 8]
    assert now.events["rating"].nan_to_num(-1).tolist() == [-1, 1, 2, -1, 3]
    assert now.events["time_gap"].nan_to_num(-1).tolist() == [-1, 10, 20, -1, 30]


@pytest.mark.parametrize("room", [1, 4, 6, 20])
def test_of_an_inserted_sequence_the_latest_items_stay(room):
    batch = random_batch(60).last(room)
    whole = Insert(0.5)(batch, RNG, SIDE)
    side = Known(SIDE.dataset)
    side.similar_items = SIDE.similar_items
    side.shard = Shard(np.empty(0, np.int64), max_len=room)
    made = Insert(0.5)(batch, RNG, side)
    assert lists_of(made) == [row[-room:] for row in lists_of(whole)]
    assert made.max_seq_len <= room and max(map(len, lists_of(whole))) > min(room, 12)


def test_targets_of_steps_that_follow_each_other():
    batch = from_sequences([[1, 2, 3, 4, 5, 6]])
    twice = MaskLast(2)(MaskLast()(batch, RNG, SIDE), RNG, SIDE)
    assert lists_of(twice) == [[1, 2, 3, MASK, MASK, MASK]]
    assert twice.events["target"].tolist() == [-100, -100, -100, 4, 5, 6], "a [MASK] is no item"
    pair = Mask(0.0)(MaskLast()(from_sequences([[1, 2], [], [3]]), RNG, SIDE), RNG, SIDE)
    assert lists_of(pair) == [[1, MASK], [], [MASK]], "a sequence that has a target needs no other"
    ahead = MaskLast()(NextItem()(batch, RNG, SIDE), RNG, SIDE)
    assert lists_of(ahead) == [[1, 2, 3, 4, MASK]]
    assert ahead.events["target"].tolist() == [2, 3, 4, 5, 5], "a masked event predicts itself"
    cropped = Crop(0.5)(MaskLast(6)(batch, RNG, SIDE), RNG, SIDE)
    assert (cropped.values == MASK).all() and len(cropped.values) == 3
    start = int(cropped.events["target"][0])
    assert cropped.events["target"].tolist() == [start, start + 1, start + 2], "targets move along"


def test_a_dropped_run_is_what_another_keeps():
    """CLUE drops the run that CL4SRec keeps; a single item is left, and a pair loses one."""
    batch = random_batch(40)
    kept, rest = (Crop(**{how: 0.4})(batch, RNG, SIDE) for how in ("keep", "drop"))
    for whole, run, others in zip(*map(lists_of, (batch, kept, rest)), strict=True):
        if len(whole) > 1:
            assert sorted(run + others) == sorted(whole)
        else:
            assert others == whole
    assert Crop() == Crop(0.6) and Crop(drop=0.4).keep is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith("mask")])
def test_the_same_masks_on_cuda(name):
    batch = random_batch(300)
    made = partial(STEPS[name], rng=RNG, side=SIDE)
    assert same(made(batch), made(batch.to("cuda")).to("cpu"))
