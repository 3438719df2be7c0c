# SPDX-License-Identifier: Apache-2.0
"""Objectives by hand and against dense PyTorch; the joint loss of one encoder pass."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import (
    AGE,
    CITY,
    GRAPH,
    JOINT,
    SOCIAL_VIEWS,
    Known,
    loader_of,
    model_of,
    six_users,
    social_side,
)
from torch import nn

from fastrec.data.batch import from_sequences
from fastrec.data.graph import FriendSampler, SocialGraph
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask
from fastrec.data.views import Again
from fastrec.nn.item_parts import Segment
from fastrec.nn.items import Items
from fastrec.nn.user_model import UserModel
from fastrec.objectives.align import Align
from fastrec.objectives.click import Click
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.friends import Friends, SocialRelationDetection
from fastrec.objectives.item import Item, Sampled
from fastrec.objectives.joint import JointObjective, Term, total_loss
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributePrediction, UserAttributes
from fastrec.random import Rng
from fastrec.training.fit import fit

TOKENS = ["cls", "sep"]


def columns(users: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"age": AGE.values[users], "city": CITY.values[users]}


def values_of(terms) -> dict[str, torch.Tensor]:
    return {term.name: term.loss for term in terms}


def test_attributes_by_hand():
    head = UserAttributePrediction(2, [AGE, CITY])
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]]))
    users = torch.tensor([[1.0, 0], [0, math.log(2)], [5, 5], [1, 0], [0, 0], [0, 0]])
    losses = head.losses(users, columns(torch.arange(6)))
    # Errors of the five known ages: 0.5, 3 (beyond delta: 3 - 0.5), 0, 0 and -0.25.
    age, count = losses["age"]
    assert count == 5 and age.item() == pytest.approx((0.125 + 2.5 + 0.03125) / 5)
    # Classes 0, 2, 1, -, 2, 0 with logits (0, 0, 0), (ln 2, 0, 0), (5, 0, 0), (0, 0, 0).
    city, count = losses["city"]
    third = math.log(3)
    expected = third + math.log(4) + math.log(2 + math.exp(5)) + 2 * third
    assert count == 5 and city.item() == pytest.approx(expected / 5)


def test_attributes_that_nobody_has_give_zero_with_a_live_graph():
    head = UserAttributePrediction(2, [AGE, CITY])
    users = torch.ones(2, 2, requires_grad=True)
    missing = {"age": torch.full((2,), float("nan")), "city": torch.full((2,), -1)}
    losses = head.losses(users, missing)
    total = sum(loss for loss, _ in losses.values())
    total.backward()
    assert total == 0 and [int(n) for _, n in losses.values()] == [0, 0]
    assert not users.grad.any() and not head.linear.weight.grad.any()
    with pytest.raises(ValueError, match="no column 'city', it has \\['age'\\]"):
        head.losses(users, {"age": missing["age"]})


@pytest.mark.parametrize("emptied", [(), (1,), (0, 5)])
def test_relations_equal_dense_pytorch(emptied):
    """Eq. 13-14 on six users, with differences, loops and a mask. Those whose sequence a step has
    emptied ask for nobody, are asked for by nobody and are nobody's negatives."""
    users = np.array([5, 3, 0, 1, 4, 2])
    profile = np.array([0, 1, 2, 2, 3, 4])
    sequences, pairs = FriendSampler(GRAPH, hops=1, profile=profile).pairs_at(users, Rng(0, 0))
    head = SocialRelationDetection(3).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([0.5, -0.2, 1.5]))
        head.bias.fill_(0.7)
    vectors = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    there = torch.from_numpy(~np.isin(sequences, emptied)) if emptied else None
    loss, count = head.loss(vectors, pairs, there)
    grads = torch.autograd.grad(loss, [vectors, head.weight, head.bias])

    rows, friends = GRAPH.draw_friends(users, Rng(0, 0))
    place = {user: i for i, user in enumerate(sequences)}
    near = {0: {0, 1}, 1: {0, 1, 2}, 2: {1, 2}, 3: {3, 4}, 4: {3, 4}}
    terms = []
    for user, friend in zip(users[rows], friends, strict=True):
        if {user, friend} & set(emptied):
            continue
        logits = []
        for other in [friend, *friends[friends != friend]]:
            if other != friend and (other in near[user] or profile[other] == profile[user]):
                continue
            if other in emptied:
                continue
            difference = vectors[place[user]] - vectors[place[other]]
            logits.append(-((head.weight * difference**2).sum() + head.bias))
        terms.append(torch.stack(logits).logsumexp(0) - logits[0])
    expected = torch.stack(terms).mean()
    wanted = torch.autograd.grad(expected, [vectors, head.weight, head.bias])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and count == len(terms)
    for grad, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12)
    assert grads[2] == 0


def test_similarity_weights_start_at_one_over_width_or_as_told():
    for initial, expected in ((None, 1 / 8), (1.0, 1.0)):
        head = Friends(initial=initial).build(model_of(), social_side())
        assert head.weight.tolist() == [expected] * 8


def test_no_friends_give_zero_with_a_live_graph():
    lonely = FriendSampler(SocialGraph.from_pairs(np.empty((0, 2)), 6))
    _, pairs = lonely.pairs_at(np.arange(6), Rng(0, 0))
    head, vectors = SocialRelationDetection(3), torch.randn(6, 3, requires_grad=True)
    loss, _ = head.loss(vectors, pairs)
    loss.backward()
    assert loss == 0 and not vectors.grad.any() and not head.weight.grad.any()


def test_the_joint_loss_is_the_weighted_sum_from_one_encoder_pass(monkeypatch):
    model, side = model_of(tokens=TOKENS), social_side()
    joint = JointObjective(JOINT, model, side)
    views = loader_of(model, SOCIAL_VIEWS, side).batch_at(0)
    batch = views["main"]
    assert len(batch) == 6  # all friends are in the batch
    calls = []
    encode = UserModel.encode
    monkeypatch.setattr(UserModel, "encode", lambda *a: calls.append(1) or encode(*a))
    terms = joint(model, views, Rng(3, 4))
    assert len(calls) == 1

    states = model.encode(batch, Rng(3, 4)).states
    target = batch.events["target"]
    rows = (target >= 0).nonzero().squeeze(1)
    assert (batch.values[rows] == 20).all() and len(rows) >= 6  # at least one [MASK] a user
    logits = F.linear(model.item_head.query(states[rows]), model.item_table, model.item_head.bias)
    item = F.cross_entropy(logits, target[rows])
    ends = zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)
    pooled = torch.stack([states[a + 1 : b - 1].amax(0) for a, b in ends])  # no [CLS], no [SEP]
    users = batch.sample_ids
    heads = joint.parts
    age, city = heads["user_attributes"].linear(pooled).split([1, 3], 1)
    known = ~AGE.values[users].isnan()
    attributes = F.huber_loss(age.squeeze(1)[known], AGE.values[users][known])
    attributes = attributes + F.cross_entropy(city, CITY.values[users], ignore_index=-1)
    friends, _ = heads["friends"].loss(pooled, batch.pairs)
    torch.testing.assert_close(total_loss(terms), item + 0.3 * attributes + 0.5 * friends)
    assert [(t.name, t.weight) for t in terms] == [
        ("item", 1.0),
        ("user_attributes.age", 0.3),
        ("user_attributes.city", 0.3),
        ("friends", 0.5),
        ("friends.negatives", 0.5),
    ]
    numbers = [len(rows), 5, int((CITY.values[users] >= 0).sum()), 5]  # user 5 has no friend
    assert [int(t.number) for t in terms[:4]] == numbers


def test_a_value_without_a_count_is_looked_at_and_not_trained():
    terms = [
        Term("a", 2.0, torch.tensor(3.0), 7),
        Term("a.seen", 2.0, torch.tensor(1e6), None),
        Term("b", 0.5, torch.tensor(4.0), torch.tensor(2)),
    ]
    assert total_loss(terms) == 8.0
    model, side = model_of(), social_side()
    joint = JointObjective(JOINT, model, side)
    views = loader_of(model, SOCIAL_VIEWS, side).batch_at(0)
    seen = joint(model, views, Rng(0, 0))[-1]
    assert seen.name == "friends.negatives" and seen.number is None
    assert seen.loss == views["main"].pairs.negatives > 0


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    model, side = model_of(tokens=TOKENS), social_side()
    joint = JointObjective(JOINT, model, side)
    losses = []
    for users in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 3, 1]):
        loader = loader_of(model, SOCIAL_VIEWS, side, users=users, shuffle=False)
        terms = joint(model, loader.batch_at(0), Rng(3, 0))
        losses.append(torch.stack([term.loss for term in terms]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_friends_from_outside_the_batch_are_in_all_objectives_of_their_view_alone():
    """A view without friends beside it is the same whatever the other one holds."""
    model, side = model_of(tokens=TOKENS), social_side()
    apart = {
        "item": Item(views=["own"]),
        "user_attributes": UserAttributes(views=["own"]),
        "friends": Friends(),
    }
    views = {**SOCIAL_VIEWS, "own": [Mask()]}
    options = dict(users=[1, 5], batch_size=2, shuffle=False)
    joint = JointObjective(apart, model, side)
    batch = loader_of(model, views, side, **options).batch_at(0)
    assert len(batch["own"]) == 2 and len(batch["main"]) == 3
    friend = batch["main"].sample_ids[2]
    assert friend in (0, 2) and batch["main"].users["city"][2] == CITY.values[friend]
    own = values_of(joint(model, batch, Rng(0, 0)))
    together = JointObjective({**JOINT}, model, side)
    together.load_state_dict(joint.state_dict())
    main = {"main": batch["main"]}
    all_three = values_of(together(model, main, Rng(0, 0)))
    torch.testing.assert_close(all_three["friends"], own["friends"])
    assert not torch.allclose(all_three["item"], own["item"])
    expected = CITY.values[batch["main"].sample_ids]
    pooled = model.pool(model.encode(batch["main"], Rng(0, 0)), "max")
    logits = together.parts["user_attributes"].linear(pooled)[:, 1:]
    torch.testing.assert_close(
        all_three["user_attributes.city"], F.cross_entropy(logits, expected, ignore_index=-1)
    )


def test_attributes_by_cls_of_a_view_without_steps():
    model, side = model_of(dropout=0.0, tokens=TOKENS), Known(six_users(), [CITY])
    joint = JointObjective({"user_attributes": UserAttributes(pool="cls")}, model, side)
    views = loader_of(model, {"main": []}, side).batch_at(0)
    (term,) = joint(model, views, Rng(0, 0))
    batch = model.inputs(six_users(), views["main"].sample_ids, "train")
    assert torch.equal(views["main"].values, batch.values)  # nothing is masked
    cls = model.encode(batch).states[batch.offsets[:-1]]
    logits, target = joint.parts["user_attributes"].linear(cls), CITY.values[batch.sample_ids]
    assert term.name == "user_attributes.city"
    torch.testing.assert_close(term.loss, F.cross_entropy(logits, target, ignore_index=-1))


def test_four_views_in_one_pass_are_four_passes():
    """Without dropout bit for bit, and each objective reads its own views."""
    model, side = model_of(dropout=0.0, tokens=TOKENS), social_side()
    steps = {**SOCIAL_VIEWS, "a": [Crop()], "b": [Mask()], "again": [Again("b")]}
    parts = {**JOINT, "contrast": Contrast(["a", "b"], weight=0.1)}
    joint = JointObjective(parts, model, side)
    views = loader_of(model, steps, side).batch_at(2)
    assert [view.keys[0].item() >> 32 for view in views.values()] == [0, 1, 2, 3]
    encoded = model.encode_views(views, Rng(3, 2))
    for name, view in views.items():
        alone = model.encode(view, Rng(3, 2))
        assert torch.equal(encoded[name].states, alone.states), name
        assert encoded[name].batch is view
    assert torch.equal(views["b"].values, views["again"].values)
    terms = joint(model, views, Rng(3, 2))
    alone = JointObjective({"contrast": parts["contrast"]}, model, side)
    (expected,) = alone(model, {"b": views["b"], "a": views["a"]}, Rng(3, 2))
    assert terms[-1].loss == expected.loss and terms[-1].weight == 0.1
    swapped = JointObjective({"contrast": Contrast(["a", "again"])}, model, side)
    assert swapped(model, views, Rng(3, 2))[0].loss == expected.loss  # the same events as b


class Near(nn.Module):
    """An objective of one's own: the first view of a user is twice the second."""

    weight, views = 0.25, ["b", "a"]

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, model, rng, *views):
        first, second = (model.pool(view, "mean") for view in views)
        gap = self.scale * (first - 2 * second).square().mean()
        return {"near": (gap, len(first)), "scale": (self.scale.detach(), None)}


@dataclass(frozen=True)
class NearSettings:
    views: list[str]
    weight: float = 1.0

    def build(self, model, side):
        assert model.num_items == side.num_items
        return Near()


def test_an_objective_of_ones_own_is_a_module_or_settings():
    model, side = model_of(), Known(six_users())
    steps = {"main": [Mask()], "a": [Crop()], "b": [Mask()]}
    views = loader_of(model, steps, side).batch_at(0)
    encoded = model.encode_views(views, Rng(1, 0))
    pooled = {name: model.pool(view, "mean") for name, view in encoded.items()}
    for mine, weight, read in (
        (Near(), 0.25, ("b", "a")),
        (NearSettings(["main", "a"], weight=3.0), 3.0, ("main", "a")),
    ):
        joint = JointObjective({"item": Item(), "near": mine}, model, side)
        terms = joint(model, views, Rng(1, 0))
        expected = 2.0 * (pooled[read[0]] - 2 * pooled[read[1]]).square().mean()
        assert [term.name for term in terms] == ["item", "near", "near.scale"]
        torch.testing.assert_close(terms[1].loss, expected)
        torch.testing.assert_close(total_loss(terms), terms[0].loss + weight * expected)
        assert [id(p) for p in joint.find(Near).parameters()] == [id(joint.parts["near"].scale)]


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, model, rng, view):
        return self.value


def test_errors_name_the_problem():
    model, side = model_of(), social_side()
    with pytest.raises(ValueError, match="there is no objective to train"):
        JointObjective({}, model, side)
    with pytest.raises(ValueError, match=r"the weight of item is 0\.0, expected above 0"):
        JointObjective({"item": Item(weight=0)}, model, side)
    for objective in (UserAttributes(pool="cls"), Friends(pool="cls")):
        with pytest.raises(ValueError, match=r"pool 'cls' needs cls in model\.tokens, \[\]"):
            JointObjective({"mine": objective}, model, side)
    with pytest.raises(TypeError, match="the objective mine is a class: give an instance of it"):
        JointObjective({"mine": Item}, model, side)
    views = loader_of(model, {"main": []}, side).batch_at(0)
    for wrong in (torch.zeros(()), {"a": torch.zeros(())}, {"a": (torch.zeros(2), 2)}, None):
        joint = JointObjective({"mine": Returns(wrong)}, model, side)
        with pytest.raises(TypeError, match=r"the objective mine returned .*, expected {label:"):
            joint(model, views, Rng(0, 0))
    for objective, message in (
        (Friends(), "the objective friends has no pairs: it needs friend"),
        (Item(), "the objective item has no targets: it needs mask, mask_last or next_item"),
        (Click(), "the objective click has no targets: it needs mask, mask_last or next_item"),
    ):
        joint = JointObjective({"mine": objective}, model, side)
        with pytest.raises(ValueError, match=message):
            joint(model, views, Rng(0, 0))
    with pytest.raises(ValueError, match="loss bce needs negatives"):
        Item(loss="bce")
    with pytest.raises(ValueError, match="log_q has no effect on the loss bce"):
        Item(loss="bce", sampled=Sampled(log_q=True))
    with pytest.raises(ValueError, match="gbce_t has no effect on the loss softmax"):
        Item(sampled=Sampled(gbce_t=0.5))
    with pytest.raises(ValueError, match="bpr_reg has no effect on the loss bce"):
        Item(loss="bce", sampled=Sampled(bpr_reg=0.5))
    with pytest.raises(ValueError, match="bpr_max needs shared negatives: sampled.shared: true"):
        Item(loss="bpr_max", sampled=Sampled(shared=False))
    with pytest.raises(ValueError, match=r"sampled\.bpr_reg must be at least 0, got -1"):
        Sampled(bpr_reg=-1)
    with pytest.raises(ValueError, match=r"loss must be one of .*, got 'hinge'"):
        Item(loss="hinge")
    with pytest.raises(ValueError, match=r"sampled\.alpha has no effect: negatives are uniform"):
        Sampled(alpha=0.5)
    with pytest.raises(
        ValueError,
        match=r"sampled\.negatives must be at least 1, or 0 with sampled\.in_batch, got 0",
    ):
        Sampled(negatives=0)
    with pytest.raises(ValueError, match="all counts are 0"):
        side.item_counts = torch.zeros(20)
        Item(sampled=Sampled(by="popularity")).build(model, side)


def test_a_view_is_encoded_as_it_is_alone():
    """Whatever columns other views have."""
    items = Items(segment=Segment(width=16))
    model = model_of(dropout=0.0, items=items)
    nn.init.normal_(model.item_input.levels["segment"].weight)
    batch = from_sequences([[1, 2, 3], [4, 5]])
    told = replace(
        batch,
        events={
            "segment": torch.tensor([0, 0, 1, 0, 1]),
            "position": torch.tensor([0, 1, 1, 0, 3]),
        },
    )
    both = model.encode_views({"told": told, "plain": batch})
    for name, view in (("told", told), ("plain", batch)):
        torch.testing.assert_close(both[name].states, model.encode(view).states)


@pytest.mark.parametrize("part", [Contrast, Align, Segments])
def test_two_views_are_two(part):
    with pytest.raises(ValueError, match=r"compares two views, got \['a', 'a'\]"):
        part(["a", "a"])


@pytest.mark.parametrize("part", [Contrast(["a", "b"], pool="max"), Align(["a", "b"], pool="max")])
def test_views_that_are_the_same_are_refused(part, tmp_path):
    model = model_of(dropout=0.0)
    for views in ({"a": [], "b": []}, {"a": [Crop()], "b": [Again("a")]}):
        stage = dict(views=views, objectives={"part": part}, judge="vectors")
        with pytest.raises(ValueError, match="part has no effect: without dropout and steps its"):
            fit(six_users(), model, steps=2, output=tmp_path / "run", **stage)
    assert not (tmp_path / "run").exists()


def test_an_attribute_with_the_name_of_a_column_of_batches_is_refused():
    """It was trained on that column."""
    side = SimpleNamespace(attributes=[replace(CITY, name="follows")], user_columns={})
    with pytest.raises(ValueError, match="attribute 'follows' has the name of a column of batches"):
        UserAttributes().build(model_of(), side)
