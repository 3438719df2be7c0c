# SPDX-License-Identifier: Apache-2.0
"""Settings are checked where they are made, and the error names them."""

import pytest
from builders import MODEL

from fastrec.bench import loss_times
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.reorder import Reorder
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.fm import Fm
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective
from fastrec.objectives.parts import Objectives
from fastrec.training.checks import check_stage
from fastrec.training.config import Users
from fastrec.training.stage import Init, Stage

PAIR = {"a": [Mask()], "b": [Mask()]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Stage(schedule="cosin"),
            r"schedule must be one of \['constant', 'cosine', 'linear'\]",
        ),
        (lambda: Stage(backend="c"), "backend must be one of"),
        (lambda: Stage(judge="items"), "judge must be one of"),
        (lambda: Stage(devices=0), "devices must be in .1, 1024. or 'auto', got 0"),
        (lambda: Stage(steps=0), "steps must be at least 1, got 0"),
        (lambda: Stage(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Stage(validate_every=0), "validate_every must be at least 1, got 0"),
        (lambda: Stage(checkpoint_every=0), "checkpoint_every must be at least 1, got 0"),
        (lambda: Stage(learning_rate=float("nan")), "learning_rate must not be negative, got nan"),
        (lambda: Stage(warmup_steps=-1), "warmup_steps must not be negative, got -1"),
        (lambda: Stage(weight_decay=-1), "weight_decay must not be negative, got -1"),
        (lambda: Stage(gradient_clip=-1), "gradient_clip must not be negative, got -1"),
        (lambda: Stage(patience=-1), "patience must not be negative, got -1"),
        (
            lambda: Stage(steps=30, validate_every=8),
            r"steps \(30\) must be a multiple of validate_every \(8\)",
        ),
        (
            lambda: Stage(monitor="steps", patience=3),
            "patience has no effect: with monitor: steps nothing stops early",
        ),
        (
            lambda: Stage(views=PAIR, objectives=Objectives(item=Item(views=["c"]))),
            r"the objective item reads the view 'c'; views are \['a', 'b'\]",
        ),
        (
            lambda: Stage(views=PAIR, objectives=Objectives(item=Item(views=["b"]))),
            "no objective reads the view 'a': it has no effect",
        ),
        (lambda: Init(take=["item", "heads"]), "init.take names 'heads', expected some of"),
        (
            lambda: Init(take=["items"], freeze=["encoder"]),
            "init.freeze names 'encoder', which init.take does not: random",
        ),
        (
            lambda: Init(freeze=["users"], users="other"),
            "init.freeze names 'users', which init.take does not: random",
        ),
        (
            lambda: Init(take=["encoder"], freeze=["transform"]),
            "init.freeze names 'transform', which init.take does not: random",
        ),
        (lambda: loss_times(4, 0, 4), "items must be at least 1, got 0"),
        (lambda: loss_times(4, 10, 4, rounds=0), "rounds must be at least 1, got 0"),
        (lambda: Init(patch=-1), "init.patch must not be negative, got -1"),
        (lambda: Protocol(candidates="ful"), "candidates must be one of"),
        (
            lambda: Protocol("sampled", negatives=0),
            "evaluation.negatives must be at least 1, got 0",
        ),
        (lambda: Protocol(friend_negatives=0), "evaluation.friend_negatives must be at least 1"),
        (lambda: Users(fraction=-0.1), r"users.fraction must be in \(0, 1\], got -0.1"),
        (lambda: Users(fraction=0.0), r"users.fraction must be in \(0, 1\], got 0.0"),
        (lambda: Users(fraction=2.0), r"users.fraction must be in \(0, 1\], got 2.0"),
        (lambda: Friend(hops=3), r"hops must be one of \[0, 1, 2\], got 3"),
        (lambda: Item(loss="bcd"), "loss must be one of"),
        (
            lambda: Sampled(negatives=0),
            "sampled.negatives must be at least 1, or 0 with sampled.in_batch, got 0",
        ),
        (lambda: Mask(share=1.5), r"mask.share must be in \[0, 1\], got 1.5"),
        (lambda: Mask(replace=0.8, random=0.3), r"mask.replace \+ mask.random must be at most 1"),
        (lambda: MaskLast(number=0), "mask_last.number must be at least 1, got 0"),
        (lambda: NextItem(ahead=0), "next_item.ahead must be at least 1, got 0"),
        (lambda: NextItem(positions="first"), "positions must be one of"),
        (lambda: Crop(keep=0.0), r"crop.keep must be in \(0, 1\], got 0.0"),
        (lambda: Reorder(share=1.5), r"reorder.share must be in \(0, 1\], got 1.5"),
        (lambda: OneOf([Mask()]), "one_of has 1 steps, expected at least 2"),
        (lambda: Contrast(views=["a"]), r"contrast compares two views, got \['a'\]"),
        (
            lambda: Contrast(views=["a", "b"], temperature=0.0),
            "contrast.temperature must be above 0, got 0.0",
        ),
        (
            lambda: JointObjective({"friends": Friends(weight=-1.0)}, UserModel(9, MODEL), None),
            "the weight of friends is -1.0, expected above 0",
        ),
        (lambda: ModelConfig(width=0), "model.width must be at least 1, got 0"),
        (lambda: ModelConfig(dropout=1.0), r"model.dropout must be in \[0, 1\), got 1.0"),
        (lambda: ModelConfig(tokens=["ur", "ur"]), "model.tokens must be some of cls, sep and ur"),
        (lambda: Transformer(layers=0), "layers must be at least 1, got 0"),
        (lambda: Transformer(layers=256), "layers must be at most 255, got 256"),
        (
            lambda: UserModel(9, ModelConfig(width=514, encoder=Transformer(heads=2))),
            "width 514 with heads 2: a head may have 256",
        ),
        (lambda: Gru(layers=1.5), "layers must be a whole number, got 1.5"),
        (lambda: Gru(layers="1"), "layers must be a whole number, got '1'"),
        (lambda: Caser(window=2.5), "window must be a whole number, got 2.5"),
        (lambda: Bag(hidden=[1.5]), "hidden must be a whole number, got 1.5"),
        (lambda: Fm(hidden=64), "hidden must be a list, got 64"),
        (lambda: Dilated(dilations=3), "dilations must be a list, got 3"),
    ],
)
def test_settings_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_part_of_what_is_taken_may_be_frozen():
    for inner in ("input", "transform", "users"):
        assert Init(freeze=[inner]).freeze == [inner]


@pytest.mark.parametrize("encoder", ["gru", Gru, None])
def test_an_encoder_is_settings_of_one(encoder):
    with pytest.raises(TypeError, match=r"model.encoder must be settings like Transformer\(\)"):
        ModelConfig(encoder=encoder)


@pytest.mark.parametrize("monitor", [None, "steps"])
@pytest.mark.parametrize("judge", ["next_item", "attributes"])
def test_targets_are_seen_by_no_input_whatever_is_judged(judge, monitor):
    """Next items of a bidirectional encoder are a leak, also where nothing asks for them."""
    stage = Stage(
        views={"main": [NextItem()]}, objectives=Objectives(item=Item()), judge=judge,
        monitor=monitor,
    )  # fmt: skip
    for encoder in (Transformer(), Fm()):
        with pytest.raises(ValueError, match="every event of the view 'main' would see the item"):
            check_stage("pretraining", stage, ModelConfig(encoder=encoder))


def test_a_mask_needs_an_item_beside_it():
    stage = Stage(views={"main": [Mask()]}, objectives=Objectives(item=Item()))
    with pytest.raises(ValueError, match="pretraining: model.max_len must be at least 2: a .MASK."):
        check_stage("pretraining", stage, ModelConfig(max_len=1))
    check_stage("pretraining", stage, ModelConfig(max_len=2))
