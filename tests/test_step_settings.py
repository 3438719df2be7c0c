# SPDX-License-Identifier: Apache-2.0
"""Settings of steps: shares that move and are rounded, wrong ones named, and names of recipes."""

from dataclasses import replace

import pytest
import torch
from builders import Known, dataset_of, same
from plain_steps import MASK, RNG, SIDE, V, copies, random_batch, share_of

from fastrec.data.steps.crop import Crop
from fastrec.data.steps.drop import Drop
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.parts import Step
from fastrec.data.steps.reorder import Reorder
from fastrec.data.steps.share import Schedule, number_of
from fastrec.data.steps.substitute import Substitute
from fastrec.data.steps.window import Window
from fastrec.data.views import Again, extra
from fastrec.random import Rng


def test_a_share_that_moves_is_that_of_its_step():
    share, batch = Schedule(0.9, 0.3, 6), copies(list(range(10)), 20)
    kept = [Crop(share)(batch, Rng(3, step), SIDE).max_seq_len for step in range(9)]
    assert kept == [9, 8, 7, 6, 5, 4, 3, 3, 3]
    grown = [
        int((Mask(Schedule(0.2, 0.8, 3), exact=True)(batch, Rng(3, s), SIDE).values == MASK).sum())
        for s in range(5)
    ]
    assert grown == [40, 80, 120, 160, 160]


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_a_share_of_a_number_is_that_of_its_decimals(rounding):
    """0.28 of 25 is 7, and 0.29 of 100 is 29, whatever their product is in binary."""
    numbers = torch.arange(301)
    for percent in range(101):
        expected = [max(1, share_of(percent / 100, n, rounding)) for n in numbers.tolist()]
        assert number_of(percent / 100, numbers, rounding).tolist() == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mask(1.5), r"mask.share must be in \[0, 1\], got 1.5"),
        (lambda: Mask(replace=0.9, random=0.2), r"mask.replace \+ mask.random .* got 0.9 \+ 0.2"),
        (lambda: Mask(replace=0.0), "are both 0: the input shows its targets"),
        (lambda: Mask(replace=-0.1), r"mask.replace must be in \[0, 1\], got -0.1"),
        (lambda: MaskLast(0), "mask_last.number must be at least 1, got 0"),
        (lambda: NextItem("first"), r"positions must be one of \['all', 'last'\], got 'first'"),
        (lambda: NextItem(ahead=0), "next_item.ahead must be at least 1, got 0"),
        (lambda: Crop(0.0), r"crop.keep must be in \(0, 1\], got 0"),
        (lambda: Crop(drop=0.0), r"crop.drop must be in \(0, 1\], got 0"),
        (lambda: Crop(drop=1.1), r"crop.drop must be in \(0, 1\], got 1.1"),
        (lambda: Crop(0.6, 0.3), r"crop has keep, 0.6, and drop, 0.3: it takes one"),
        (lambda: Crop(1.1), r"crop.keep must be in \(0, 1\], got 1.1"),
        (lambda: Crop(round="near"), r"round must be one of \['down', 'up'\], got 'near'"),
        (lambda: Crop(Schedule(0.0, 0.5, 9)), r"crop.keep must be in \(0, 1\], got 0"),
        (lambda: Reorder(Schedule(0.5, 1.5, 9)), r"reorder.share must be in \(0, 1\], got 1.5"),
        (lambda: Mask(Schedule(0.5, -1.0, 9)), r"mask.share must be in \[0, 1\], got -1"),
        (lambda: Fill(0.0), r"fill.share must be in \(0, 1\], got 0"),
        (lambda: Fill(among=0), "fill.among must be at least 1, got 0"),
        (lambda: Schedule(0.1, 0.5, 0), "steps must be at least 1, got 0"),
        (lambda: Schedule(0.5, 0.5, 9), "start and end are both 0.5: such a share is a number"),
        (lambda: Window(), "window.share and window.count: exactly one of them is set"),
        (lambda: Window(0.5, 3), "window.share and window.count: exactly one of them is set"),
        (lambda: Window(0.0), r"window.share must be in \(0, 1\], got 0"),
        (lambda: Window(count=0), "window.count must be at least 1, got 0"),
        (lambda: Mask(leave=1), "mask.leave has no effect: mask.exact is false"),
        (lambda: Mask(round="up"), "mask.round has no effect: mask.exact is false"),
        (lambda: Mask(exact=True, leave=-1), "mask.leave must not be negative, got -1"),
        (lambda: OneOf([Mask()], independent=True), "any_of has 1 steps, expected at least 2"),
        (lambda: Drop(1.0), r"drop.share must be in \(0, 1\), got 1"),
        (lambda: Reorder(0.0), r"reorder.share must be in \(0, 1\], got 0"),
        (lambda: OneOf([Mask()]), "one_of has 1 steps, expected at least 2"),
        (lambda: Crop(least=0), "crop.least must be at least 1, got 0"),
        (lambda: Reorder(least=0), "reorder.least must be at least 1, got 0"),
        (lambda: Substitute(0.0), r"substitute.share must be in \(0, 1\], got 0"),
        (lambda: Insert(1.5), r"insert.share must be in \(0, 1\], got 1.5"),
        (lambda: Friend(3), r"hops must be one of \[0, 1, 2\], got 3"),
        (lambda: Step(), "step names none: one of"),
        (lambda: Step(mask=Mask(), crop=Crop()), "step names mask and crop: one of"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_calls_that_cannot_work_say_why():
    batch = random_batch(3)
    with pytest.raises(ValueError, match="65536 events, got 65537"):
        Mask()(replace(batch, max_seq_len=65_537), RNG, SIDE)
    with pytest.raises(ValueError, match="fill needs a masked-item model: the key filler of the s"):
        Fill()(batch, RNG, Known(dataset_of([[0, 1, 2]], V)))
    with pytest.raises(ValueError, match="again .of a. must be the first one of its view"):
        Again("a")(batch, RNG, SIDE)


def test_a_step_of_a_recipe_is_the_part_that_it_names():
    batch = random_batch(30)
    inner = [Step(crop=Crop()), Step(mask=Mask(0.3))]
    for step, part in (
        (Step(mask=Mask(0.4)), Mask(0.4)),
        (Step(mask_last=MaskLast()), MaskLast()),
        (Step(next_item=NextItem(ahead=3)), NextItem(ahead=3)),
        (Step(one_of=inner), OneOf([Crop(), Mask(0.3)])),
        (Step(any_of=inner), OneOf([Crop(), Mask(0.3)], independent=True)),
        (Step(substitute=Substitute(0.4)), Substitute(0.4)),
        (Step(insert=Insert()), Insert()),
    ):
        assert same(step(batch, RNG, SIDE), part(batch, RNG, SIDE))
        assert extra([step]) == isinstance(part, NextItem)
    assert isinstance(Step(again=Again("a")).part, Again)
    assert extra([Step(one_of=[Step(next_item=NextItem()), *inner])]) == 1  # of a choice too
