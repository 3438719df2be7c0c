# SPDX-License-Identifier: Apache-2.0
"""Views of a batch: numbers in the keys, room for targets, copies, users and friends."""

from functools import partial

import numpy as np
import pytest
import torch
from builders import GRAPH, Known, dataset_of, lists_of, model_of, same, tensors_of

from fastrec.data.batch import framed, from_sequences
from fastrec.data.side import Shard
from fastrec.data.steps.click import Click
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.parts import Step
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.reorder import Reorder
from fastrec.data.views import Again, Views, parts_of
from fastrec.random import Rng

V, LENGTH = 20, 6
MASK, CLS, SEP = V, V + 1, V + 2
RNG = Rng(2, 9)
SEQUENCES = [list(range(n)) for n in (5, 11, 8, 9, 14, 3)]  # "train" holds two items less
frame = partial(framed, before=[CLS], after=[SEP])


def side_of() -> Known:
    side = Known(dataset_of(SEQUENCES, V), graph=GRAPH)
    side.user_columns["age"] = torch.arange(6) * 10
    return side


def made_of(views: dict, users=(0, 1, 2, 3, 4, 5), frame=frame, rank=0, world_size=1) -> dict:
    """The views of these users as the loader asks for them."""
    side = side_of()
    views = Views(views, frame, side, LENGTH)
    side.max_len = views.length
    batch = side.gather(list(users[rank::world_size]))
    return views(batch, RNG, Shard(np.array(users), rank, world_size))


def inputs(length: int, users=range(6)) -> list[list[int]]:
    return [SEQUENCES[user][:-2][-length:] for user in users]


def test_a_view_has_its_number_in_the_keys():
    made = made_of({"a": [], "b": [Mask()], "c": []})
    assert list(made) == ["a", "b", "c"]
    for number, view in enumerate(made.values()):
        assert view.keys.tolist() == [number << 32 | user for user in range(6)]
        assert view.users["age"].tolist() == [0, 10, 20, 30, 40, 50]
    assert lists_of(made["a"]) == [[CLS, *row, SEP] for row in inputs(LENGTH)]
    assert made["a"].max_seq_len == LENGTH + 2 and made["a"].scored is None
    assert same(made["c"], made["a"].as_view(2)), "the steps of one view do not touch another"


def test_a_view_is_its_steps_one_after_another():
    side = side_of()
    batch = side.gather(range(6), LENGTH)
    steps = [Crop(0.7), Reorder(), Mask(0.4)]
    expected = batch.as_view(1)
    for step in steps:
        expected = step(expected, RNG, side)
    made = made_of({"plain": [], "main": steps})["main"]
    assert same(made, frame(expected).with_scored())
    assert torch.equal(made.values[made.scored], torch.full_like(made.scored, MASK))
    again = made_of({"plain": [], "main": [Step(crop=Crop(0.7)), *steps[1:]]})["main"]
    assert same(again, made), "steps of a recipe are steps"


def test_the_users_of_a_step_are_left_as_they_are():
    side = side_of()
    batch = side.gather(range(6))
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    views = {"a": [Mask()], "b": [NextItem()], "c": [Again("a"), Crop()], "d": [Friend(), Mask()]}
    Views(views, frame, side, LENGTH)(batch, RNG, Shard(np.arange(6)))
    after = tensors_of(batch)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_again_is_the_same_sequences_with_another_number():
    made = made_of(
        {"a": [Crop(), Mask(0.5)], "b": [], "c": [Again("a")], "d": [Step(again=Again("a"))]}
    )
    assert same(made["c"].as_view(0), made["a"]) and (made["c"].keys >> 32 == 2).all()
    assert same(made["d"].as_view(0), made["a"]) and (made["d"].keys >> 32 == 3).all()
    more = made_of({"a": [Crop(0.5)], "b": [Again("a"), MaskLast()]})
    for whole, masked in zip(lists_of(more["a"]), lists_of(more["b"]), strict=True):
        assert masked == [*whole[:-2], MASK, SEP], "steps go on from the other view"
    assert "target" not in more["a"].events


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"a": [Again("b")], "b": []}, "view 'a' takes 'b' again, which does not stand before it"),
        ({"a": [Again("a")]}, "view 'a' takes 'a' again"),
        ({"a": [], "b": [Step(again=Again("c"))]}, "view 'b' takes 'c' again"),
    ],
)
def test_again_of_a_view_that_does_not_stand_before(views, message):
    with pytest.raises(ValueError, match=message):
        Views(views, frame, side_of(), LENGTH)


def test_next_item_is_given_an_item_more():
    for step in (NextItem(), Step(next_item=NextItem())):
        views = {"main": [step], "plain": [], "masked": [Mask(1.0)]}
        assert Views(views, frame, side_of(), LENGTH).length == LENGTH + 1
        made = made_of(views)
        expected = [row[:-1] for row in inputs(LENGTH + 1)]
        assert lists_of(made["main"]) == [[CLS, *row, SEP] for row in expected]
        targets = [[-100, *row[1:], -100] for row in inputs(LENGTH + 1)]
        assert lists_of(made["main"], made["main"].events["target"]) == targets
        assert made["main"].max_seq_len == LENGTH + 2
        assert lists_of(made["plain"]) == [[CLS, *row, SEP] for row in inputs(LENGTH)]
        assert made["masked"].lengths.tolist() == made["plain"].lengths.tolist()
    assert Views({"main": []}, frame, side_of(), LENGTH).length == LENGTH
    assert Views({}, frame, side_of(), LENGTH).length == LENGTH


def test_a_sequence_that_a_step_empties_is_framed():
    made = made_of({"main": [NextItem()]}, users=(5, 1))["main"]
    assert lists_of(made)[0] == [CLS, SEP] and (made.scored >= 2).all()


@pytest.mark.parametrize("extra", [False, True])
def test_friends_join_their_view_with_the_items_that_its_users_have(extra):
    """Also where another view needs an item more: their masks are those that they would have as
    users, and none of them is cut off."""
    views = {"other": [NextItem()] if extra else [], "main": [Friend(), Mask(0.01)]}
    made = made_of(views, users=(3, 0))["main"]
    ids = made.sample_ids.tolist()
    assert ids[:2] == [3, 0] and ids[2:] == [1, 4] and (made.keys >> 32 == 1).all()
    assert made.users["age"].tolist() == [10 * user for user in ids]
    assert torch.equal(made.lengths, torch.tensor([len(row) + 2 for row in inputs(LENGTH, ids)]))
    alone = made_of({"other": [], "main": [Mask(0.01)]})["main"]
    assert lists_of(made) == [lists_of(alone)[user] for user in ids]
    assert (torch.bincount(made.segment_ids()[made.scored], minlength=4) > 0).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_have_the_views_of_one_process(world_size):
    views = {"main": [Friend(), Mask()], "next": [NextItem()]}
    for users in ((2, 4, 0), (3,)):
        whole = made_of(views, users)
        parts = [made_of(views, users, rank=r, world_size=world_size) for r in range(world_size)]
        for name in views:
            found = {}
            for part in parts:
                rows = zip(part[name].keys.tolist(), lists_of(part[name]), strict=True)
                found |= dict(rows)
            expected = zip(whole[name].keys.tolist(), lists_of(whole[name]), strict=True)
            assert found == dict(expected)


def test_the_model_frames_views():
    model = model_of(num_items=V, max_len=LENGTH, tokens=["cls", "sep", "ur"])
    made = made_of(
        {"a": [Crop(), Reorder()], "b": [NextItem("last")], "c": [MaskLast()]}, frame=model.frame
    )
    ur = model.token("ur")
    for view in made.values():
        for row in lists_of(view):
            assert row[0] == CLS and row[-2:] == [SEP, ur]
            assert all(item <= MASK for item in row[1:-2]), "tokens stay where they are"
        assert view.max_seq_len <= model.max_positions
    long = from_sequences([list(range(LENGTH + 3)), [4]])
    assert lists_of(model.frame(long)) == [[CLS, *range(3, LENGTH + 3), SEP, ur], [CLS, 4, SEP, ur]]
    asked = model.frame(long, ask=True)
    assert lists_of(asked)[0] == [CLS, *range(4, LENGTH + 3), MASK, SEP, ur]


def test_the_parts_of_a_view():
    inner = [Step(crop=Crop()), Step(one_of=[Step(mask=Mask()), Step(reorder=Reorder())])]
    found = list(parts_of([Step(friend=Friend()), Step(one_of=inner), NextItem()]))
    kinds = [type(part) for part in found]
    assert kinds == [Friend, OneOf, Crop, OneOf, Mask, Reorder, NextItem]


@pytest.mark.parametrize("steps", [[Mask(0.2), Mask(0.4)], [Step(crop=Crop()), Crop(0.5)]])
def test_steps_of_one_kind_in_a_view_are_refused(steps):
    with pytest.raises(ValueError, match=r"view 'main' has (Mask|Crop) twice: both would draw"):
        made_of({"main": steps})


@pytest.mark.parametrize(
    "steps",
    [
        [Crop(), OneOf([Crop(), Mask()])],
        [OneOf([Crop(), Mask()]), Crop()],
        [OneOf([Mask(), OneOf([Crop(), Reorder()])])],
        [OneOf([Crop(), Mask()]), OneOf([Reorder(), NextItem()], independent=True)],
    ],
)
def test_what_would_draw_the_same_numbers_twice_is_refused(steps):
    """Also inside of choices: the choice of a nested one followed from that of the outer one."""
    with pytest.raises(ValueError, match="twice: both would draw the same numbers"):
        made_of({"main": steps})


def test_of_a_choice_a_sequence_takes_one_step():
    made_of({"main": [OneOf([Crop(keep=0.5), Crop(keep=0.8), Mask(share=0.2)])]})


@pytest.mark.parametrize(
    "steps, message",
    [
        ([NextItem(), Reorder()], "Reorder must stand before NextItem"),
        ([Permute(), Reorder()], "Reorder must stand before Permute"),
        ([NextItem(), Click()], "Click must stand before NextItem"),
        ([Mask(), Click()], "Click must stand before Mask"),
        ([MaskLast(), Click()], "Click must stand before MaskLast"),
        ([Mask(), NextItem()], "NextItem must stand before Mask"),
        ([OneOf([NextItem(), Crop()]), Reorder()], "Reorder must stand before NextItem"),
    ],
)
def test_what_must_stand_before_the_targets(steps, message):
    """Behind them a target was moved in front of its event, or got the label of another item."""
    with pytest.raises(ValueError, match=f"view 'a': {message}"):
        Views({"a": steps}, frame, side_of(), LENGTH)
    with pytest.raises(ValueError, match=f"view 'b': {message}"):
        Views({"a": steps[:1], "b": [Again("a"), *steps[1:]]}, frame, side_of(), LENGTH)


def test_steps_that_may_stand_behind_targets():
    for steps in ([Reorder(), NextItem()], [Mask(), Reorder()], [NextItem(), Mask()]):
        made_of({"a": steps})


def test_a_choice_is_given_what_it_asks_for_itself():
    """Permuted, an event more than the model reads would have no position."""
    made = made_of({"a": [OneOf([NextItem(), Permute()])]}, frame=lambda batch: batch)["a"]
    seen = made.events["position"]
    assert seen.max() < LENGTH
    for row, length in zip(SEQUENCES, made.lengths.tolist(), strict=True):
        items = len(row) - 2
        assert length in (min(items, LENGTH + 1) - 1, min(items, LENGTH) - 1)
    assert made.max_seq_len == LENGTH, "next_item is given one more"
