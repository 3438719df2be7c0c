# SPDX-License-Identifier: Apache-2.0
"""The views of a stage are made for its objectives, and it trains what its judge asks."""

import pytest

from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.prefix import Prefix
from fastrec.data.steps.segment import Segment
from fastrec.data.views import Again
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.objectives.click import Click
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.follows import Follows
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.item_attributes import ItemAttributes
from fastrec.objectives.rank import Rank
from fastrec.objectives.rating import Rating
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.checks import check_stage
from fastrec.training.stage import Stage


@pytest.mark.parametrize("objective", [Item(["x"]), ItemAttributes(["x"]), Click(["x"])])
@pytest.mark.parametrize("views", [["main", "x"], ["main", "y", "x"]])
def test_targets_are_seen_by_no_input_of_a_view_that_is_taken_again(objective, views):
    steps: dict = {"main": [NextItem()], "y": [Again("main")], "x": [Again(views[-2])]}
    stage = Stage(
        views={name: steps[name] for name in views}, objectives={"o": objective},
        judge="attributes", monitor="steps",
    )  # fmt: skip
    with pytest.raises(ValueError, match="every event of the view 'x' would see the item"):
        check_stage("pretraining", stage, ModelConfig())


def test_a_causal_encoder_is_trained_at_its_last_items_in_views_taken_again():
    views = {"main": [Mask()], "x": [Again("main")]}
    stage = Stage(views=views, objectives={"item": Item(["x"])})
    with pytest.raises(ValueError, match=r"trained at \[MASK\] alone in \['x'\]"):
        check_stage("pretraining", stage, ModelConfig(encoder=Transformer(causal=True)))


def test_attributes_of_items_that_are_no_target_need_such_items():
    causal = ModelConfig(encoder=Transformer(causal=True))
    for step in (NextItem(), Permute()):
        stage = Stage(views={"main": [step]}, objectives={"a": ItemAttributes()})
        with pytest.raises(ValueError, match="item_attributes.unmasked has no effect"):
            check_stage("pretraining", stage, causal)
    for step in (NextItem(positions="last"), OneOf([NextItem(), Crop()])):
        stage = Stage(views={"main": [step]}, objectives={"a": ItemAttributes()})
        check_stage("pretraining", stage, causal)
    stage = Stage(views={"main": [NextItem()]}, objectives={"a": ItemAttributes(unmasked=0)})
    check_stage("pretraining", stage, causal)


def test_the_views_of_segments_are_of_the_same_runs():
    objective = {"segments": Segments(["a", "b"])}
    for a, b in (
        ([Segment(share=0.4)], [Segment(keep=True)]),
        ([Segment()], [Prefix(), Segment(keep=True)]),
    ):
        stage = Stage(views={"a": a, "b": b}, objectives=objective, judge="vectors")
        with pytest.raises(ValueError, match="are not of the same runs"):
            check_stage("pretraining", stage, ModelConfig())
    views = {"a": [Prefix(), Segment()], "b": [Prefix(), Segment(keep=True)]}
    stage = Stage(views=views, objectives=objective, judge="vectors")
    check_stage("pretraining", stage, ModelConfig())


def test_the_views_of_rank_come_again_in_their_order():
    views = {"a": [Mask()], "a2": [Again("a")], "b": [Mask()], "b2": [Again("b")]}
    wrong = Stage(views=views, objectives={"rank": Rank(["a", "a2", "b", "b2"])}, judge="vectors")
    with pytest.raises(ValueError, match="'b' is not 'a' again"):
        check_stage("pretraining", wrong, ModelConfig())
    right = Stage(views=views, objectives={"rank": Rank(["a", "b", "a2", "b2"])}, judge="vectors")
    check_stage("pretraining", right, ModelConfig())


@pytest.mark.parametrize("kind", [UserAttributes, Rating, Friends, ColdStart, Follows])
def test_who_reads_one_view_is_given_one(kind):
    with pytest.raises(ValueError, match=r"reads one view, got \['a', 'b'\]"):
        kind(["a", "b"])
